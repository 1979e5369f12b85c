import json

import pytest

from src import configuration, listing, methods_page


@pytest.fixture(scope="module")
def listed():
    return listing.experiments()


def test_every_experiment_says_what_it_is(listed):
    assert {"mae_tiny", "mae_vitb", "mae_vitl"} <= {each.name for each in listed if each.family == "masked"}
    assert {each.name for each in listed} == set(configuration.names("experiment"))
    for each in listed:
        assert each.paper, each.name
        assert each.data, each.name
        assert each.deviations, each.name
        assert each.summary[0].isupper(), each.name
        assert each.summary.endswith("."), each.name


def test_the_pages_are_what_the_experiments_say(listed):
    project = configuration.PROJECT
    families = (project / "README.md").read_text().split(methods_page.BEGIN)[1].split(methods_page.END)[0].strip()
    assert families == methods_page.families(listed)
    page = methods_page.methods(listed, methods_page.claims(project))
    assert (project / "docs/methods.md").read_text() == page, "bring it up to date with `make pages`"


def test_a_method_s_paragraph_has_its_claims_with_their_verdicts(listed):
    claims = methods_page.claims(configuration.PROJECT)
    assert any("mae_mask_ratio" in line for line in claims["mae_vitb"])
    assert any("(claims.md#dcl)" in line for line in claims["dcl_r50"])  # its arms are SimCLR with two losses
    stored = json.loads((configuration.PROJECT / "docs/claims.json").read_text())
    assert "xclip_cross_frame" in stored
    assert any("reproduced on films_single" in line for line in claims["xclip_vitb32"])


def test_writing_the_pages_leaves_the_rest_of_the_readme_alone(tmp_path, listed, monkeypatch):
    monkeypatch.setattr(methods_page, "experiments", lambda project: listed)
    monkeypatch.setattr(methods_page, "claims", lambda project: {})
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"above\n{methods_page.BEGIN}\nold\n{methods_page.END}\nbelow\n")
    methods_page.write(tmp_path)
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert (lines[0], lines[-1]) == ("above", "below")
    assert "old" not in lines
    assert any(line.startswith("| masked | ") and "`mae_vitb`" in line for line in lines)
