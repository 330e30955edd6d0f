"""The study every test of this room looks at."""

import pytest

from tests.report.made_up_study import MadeUp, make


@pytest.fixture(scope="session")
def made_up() -> MadeUp:
    return make()
