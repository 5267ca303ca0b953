"""Bodies that the interface's schema allows, and some that it forbids, by schemathesis (pip install schemathesis)."""

import hypothesis
import pytest
from running_server import NAME

schemathesis = pytest.importorskip("schemathesis")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_bodies_by_the_schema_and_against_it(server, path, mode):
    from schemathesis.specs.openapi.checks import negative_data_rejection

    checks = [schemathesis.checks.not_a_server_error, negative_data_rejection]
    document = server.server.config.app.openapi()
    for one in document["components"]["schemas"].values():
        if "model" in one.get("properties", {}):
            one["properties"]["model"] = {"const": NAME}
    [found] = schemathesis.openapi.from_dict(document).include(path=path).get_all_operations()

    @hypothesis.given(case=found.ok().as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
    @hypothesis.settings(
        max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
    )
    def ask(case):
        case.call_and_validate(base_url=server.root, checks=checks)

    ask()
