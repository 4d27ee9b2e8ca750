"""Says so where the tests of this directory are left out, because what they are about is not installed."""

import pytest

from tests.integrations.conftest import PACKAGES


@pytest.mark.parametrize("package", PACKAGES)
def test_it_is_there(package):
    pytest.importorskip(package, reason="the extra [integrations] is not installed: its tests were left out")
