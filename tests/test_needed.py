"""What a test needs and does not find skips it on a laptop and fails it in CI."""

import math

import pytest
from needed import needed


def test_a_library_that_is_missing_fails_in_ci_and_skips_elsewhere(monkeypatch):
    assert needed("math") is math
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="no_such_library can not be imported"):
        needed("no_such_library")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="no_such_library can not be imported"):
        needed("no_such_library")
