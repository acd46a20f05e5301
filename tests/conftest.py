"""Settings of every test: plans are kept in a folder of the test run, not in the user's."""

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def cache_of_this_run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETENSOR_CACHE", os.fspath(tmp_path_factory.mktemp("cache")))
        yield
