"""The packages of integrations/, each by its own tests in an environment of its own."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from benchmarks.environments import ROOT, environment

from ..runtime import conftest as decoder
from ..runtime.constraints import vocabularies

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
    """A decoder of random weights that takes any text, with a chat template and without."""
    folder, tokenizer = tmp_path_factory.mktemp("bundles"), vocabularies.byte_level()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "V", tokenizer.get_vocab_size())
        tiny = decoder.Tiny.random([(8, 8), (16, 16)], context_length=900)
        for name, config in (("chat", {"chat_template": TEMPLATE}), ("plain", {})):
            decoder.write_bundle(folder / name, tiny, "fused", tokenizer=tokenizer, tokenizer_config=config)
    return folder


@pytest.mark.parametrize("name", PACKAGES)
def test_its_tests_pass_where_it_is_installed(name, bundles, tmp_path):
    package = ROOT / "integrations" / name
    python = environment(name, ["pytest", "--editable", str(package)], "[cpu,chat,constrained]")
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", package, package],
        cwd=tmp_path,
        env=os.environ | {"PASTKEY_TEST_BUNDLES": str(bundles), "ORT_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed in", done.stdout)
    (tmp_path / "bundle").symlink_to(bundles / "chat")
    readme = (package / "README.md").read_text(encoding="utf-8")
    for program in re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL):
        subprocess.run([python, "-c", program], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL, timeout=300)
