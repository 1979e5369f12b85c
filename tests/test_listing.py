from src import configuration, listing


def test_the_readme_s_table_is_what_make_list_says():
    readme = (configuration.PROJECT / "README.md").read_text()
    table = readme.split(listing.BEGIN)[1].split(listing.END)[0].strip()
    assert table == listing.markdown()


def test_every_experiment_says_what_it_is():
    found = listing.experiments()
    assert {"mae_tiny", "mae_vitb", "mae_vitl"} <= {each.name for each in found if each.family == "masked"}
    assert {each.name for each in found} == set(configuration.names("experiment"))
    assert all(each.paper and each.data and each.deviations for each in found)


def test_writing_the_table_leaves_the_rest_of_the_readme_alone(tmp_path):
    (tmp_path / "README.md").write_text(f"above\n{listing.BEGIN}\nold\n{listing.END}\nbelow\n")
    listing.write_readme(tmp_path)
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert (lines[0], lines[-1]) == ("above", "below")
    assert "old" not in lines
    assert any(line.startswith("| `mae_vitb` | masked | images |") for line in lines)
