"""Everything of vLLM that the plugin relies on is in the vLLM that is installed, whatever its version."""

import pytest

from kvmix_cli.serving import contract

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: `make vllm-env`")


@pytest.mark.engine
def test_the_installed_version_has_everything_that_the_plugin_uses():
    assert contract.missing_hooks() == []
    for device, hooks in contract.DEVICE_HOOKS.items():
        assert contract.missing_hooks(hooks) == [], device


@pytest.mark.engine
def test_the_installed_version_has_been_tested():
    contract.check_version(vllm.__version__)
