"""llama-server's flags as those of `pastkey serve`: the tests start this. Ends with status 2 at an unknown flag."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# flag -> how many words follow. They change nothing here: how the model is found, batch sizes, what is always on.
IGNORED = {
    "--hf-repo": 1, "--hf-file": 1, "--offline": 0, "--batch-size": 1, "--ubatch-size": 1, "--threads": 1,
    "--n-gpu-layers": 1, "--cont-batching": 0, "--no-slots": 0, "--metrics": 0, "--jinja": 0, "--no-jinja": 0,
    "--kv-unified": 0, "--verbose": 0, "--reasoning": 1,
}  # fmt: skip
TAKEN = (
    "--host", "--port", "--temp", "--seed", "--alias", "--parallel", "--n-predict", "--api-key", "--ctx-size",
    "--chat-template", "--chat-template-file",
)  # fmt: skip
# Names that the tests ask for; llama.cpp answers any.
ASKED = ("gpt-3.5-turbo", "gpt-3.5-turbo-instruct", "gpt-4.1", "davinci-002", "codellama70b")
LONGEST = 512


def read(words: Sequence[str]) -> dict[str, str]:
    """The flags that are taken."""
    found, place = {}, 0
    while place < len(words):
        flag = words[place]
        if flag not in TAKEN and flag not in IGNORED:
            print(f"the shim does not know {flag}", file=sys.stderr)
            sys.exit(2)
        following = IGNORED.get(flag, 1)
        if flag in TAKEN:
            found[flag] = words[place + 1]
        place += 1 + following
    return found


def bundle_of(flags: dict[str, str]) -> Path:
    """The bundle with the context of one slot, and with the chat template that is asked for."""
    context = int(flags.get("--ctx-size", LONGEST)) // int(flags.get("--parallel", 1))
    bundle = Path(os.environ["PASTKEY_BUNDLES"], "256" if context <= 256 else "512")
    template = flags.get("--chat-template")
    if "--chat-template-file" in flags:
        template = Path(flags["--chat-template-file"]).read_text(encoding="utf-8")
    if template in (None, "chatml"):
        return bundle
    out = Path(tempfile.mkdtemp(prefix="llama-server-")) / bundle.name
    shutil.copytree(bundle, out)
    file, manifest = out / "tokenizer_config.json", out / "pastkey.json"
    content = json.loads(file.read_text(encoding="utf-8")) | {"chat_template": template}
    file.write_text(json.dumps(content), encoding="utf-8")
    told = json.loads(manifest.read_text(encoding="utf-8"))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    told["files"][file.name] = {"size": file.stat().st_size, "sha256": digest}
    manifest.write_text(json.dumps(told), encoding="utf-8")
    return out


def main(words: Sequence[str]) -> None:
    """Becomes `pastkey serve`."""
    flags = read(words)
    names = [flags.get("--alias", "stories260K"), *ASKED]
    defaults = {"temperature": flags["--temp"], "seed": flags["--seed"]}
    if "--n-predict" in flags and int(flags["--n-predict"]) > 0:
        defaults["max_new_tokens"] = flags["--n-predict"]
    command = [sys.executable, "-m", "pastkey", "serve", str(bundle_of(flags)), "--threads", "1"]
    command += ["--host", flags["--host"], "--port", flags["--port"], "--max-concurrency", flags.get("--parallel", "1")]
    command += [word for name in names for word in ("--alias", name)]
    command += [word for name, value in defaults.items() for word in ("--default", f"{name}={value}")]
    if "--api-key" in flags:
        os.environ["PASTKEY_API_KEY"] = flags["--api-key"]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main(sys.argv[1:])
