"""The number and the choice of cases, which `make fuzz` raises."""

import os


def count(few: int) -> int:
    """Cases to try: ``few`` in the suite, ``FUZZ`` in `make fuzz`."""
    return int(os.environ.get("FUZZ", few))


def seed() -> int:
    """Seed of the choice: always the same in the suite, ``FUZZ_SEED`` in `make fuzz`."""
    return int(os.environ.get("FUZZ_SEED", 0))
