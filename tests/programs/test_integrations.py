"""The packages of integrations/, each by its own tests in a separate environment."""

from __future__ import annotations

import os
import re

import pytest

from benchmarks.environments import ROOT, environment

from ..shared import ran
from ..tiny_bundles import byte_bundle

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

PACKAGES = sorted(folder.name for folder in (ROOT / "integrations").iterdir() if (folder / "pyproject.toml").is_file())
# <tool_call> is the mark of the form in which it calls tools.
TEMPLATE = (
    "{# <tool_call> #}{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """A decoder of random weights that accepts any text, with a chat template and without."""
    folder = tmp_path_factory.mktemp("bundles")
    for name, config in (("chat", {"chat_template": TEMPLATE}), ("plain", {})):
        byte_bundle(folder / name, [(8, 8), (16, 16)], tokenizer_config=config)
    return folder


@pytest.mark.parametrize("name", PACKAGES)
def test_its_tests_pass_where_it_is_installed(name, bundles, tmp_path):
    package = ROOT / "integrations" / name
    python = environment(name, ["pytest", "--editable", str(package)], "[cpu,chat,constrained]")
    given = os.environ | {"PASTKEY_TEST_BUNDLES": str(bundles), "ORT_DISABLE_TELEMETRY": "1"}
    pytest_of = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", package, package]
    done = ran(*pytest_of, cwd=tmp_path, env=given, timeout=600)
    assert re.search(r"\d+ passed in", done.stdout)
    (tmp_path / "bundle").symlink_to(bundles / "chat")
    readme = (package / "README.md").read_text(encoding="utf-8")
    for program in re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL):
        ran(python, "-c", program, cwd=tmp_path, timeout=300)
