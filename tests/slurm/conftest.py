"""One cluster for all tests here, started once."""

import os

import pytest

from tests.distributed.conftest import extensions  # noqa: F401  (a fixture)
from tests.slurm.cluster import Cluster, missing_programs
from tests.slurm.cluster_runs import reference, submit  # noqa: F401  (fixtures)

NODES = 2


@pytest.fixture(scope="session")
def cluster(request):
    """Two nodes; proctrack/cgroup where the machine lets us, as production clusters have it."""
    missing = [*missing_programs(), *(["root"] if os.geteuid() != 0 else [])]
    if missing:
        message = f"no SLURM cluster can be started here, missing: {', '.join(missing)}"
        if os.environ.get("COMOL_REQUIRE_ALL") == "1":
            pytest.fail(message)
        pytest.skip(message)
    try:
        started, why = Cluster(NODES, "proctrack/cgroup"), ""
    except RuntimeError as error:
        started, why = Cluster(NODES, "proctrack/linuxproc"), f", as {str(error).splitlines()[0]}"
    plugins = request.config.pluginmanager
    with plugins.get_plugin("capturemanager").global_and_fixture_disabled():
        plugins.get_plugin("terminalreporter").write_line(f"SLURM: {NODES} nodes, {started.proctrack}{why}")
    yield started
    started.stop()
