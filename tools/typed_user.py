"""A user's program as an editor and mypy see it.

Only `make check` reads it; it is never run. Its mistakes are planted, and an unneeded ignore is an error as well.
"""

from __future__ import annotations

import pastkey

lm = pastkey.load("bundle/")
pastkey.load("bundle", draft="small").generate("a", draft=False).text.upper()
lm.generate("a", max_new_tokens=3, temperature=0.5, stop=["."], reuse_prefix=True, prompt_lookup=False).text.upper()
lm.generate("a", temprature=0.5)  # type: ignore[call-overload]
lm.generate("a", temperature="hot")  # type: ignore[call-overload]
lm.generate(["a", "b"], progress=print)[0].text.upper()
lm.generate([[1], [2, 3]])[0].text.upper()
lm.generate(["a"]).text.upper()  # type: ignore[attr-defined]
lm.generate("a", n=2, temperature=1.0)[0].text.upper()
lm.generate("a", n=2).text.upper()  # type: ignore[attr-defined]
lm.generate("a", dry_multipler=0.8)  # type: ignore[call-overload]
lm.generate("a", logits_processor=lambda ids, logits: logits, logprobs=2).logprobs[0].top[0][1].is_integer()
lm.score("a").total.is_integer()


async def loaded() -> None:
    (await pastkey.aload("bundle", threads=1)).embed("a")
    await pastkey.aload("bundle", thread=1)  # type: ignore[call-arg]


session = lm.session()
session.generate(" b", exact=True, timeout=2.0).cached_tokens.bit_length()
session.generate(reuse_prefix=True)  # type: ignore[call-arg]
lm.stream("a", max_tokens=3)  # type: ignore[call-arg]
pastkey.sandbox.call("score", "bundle/", {"text": "a"}, pastkey.runtime.Limits(seconds=5.0))
chat = lm.chat("be brief", template="other.jinja")
chat.ask("a", seed=3, top_k=5).ids.append(3)
chat.ask("a", sed=3)  # type: ignore[call-arg]
chat.ask("a", reuse_prefix=True)  # type: ignore[call-arg]
chat.stream("a", topk=5)  # type: ignore[call-arg]
pastkey.Generator("bundle/", exact=True, max_new_tokens=8)({"prompt": ["a"]})["text"]
pastkey.Generator("bundle/", temprature=0.5)  # type: ignore[call-arg]
pastkey.export.export("model.gguf", "bundle/", "int4", target="webgpu", force=True).weight_bytes.bit_length()
pastkey.export.export("model.gguf", "bundle/", contxt_length=512)  # type: ignore[call-arg]
pastkey.laod("bundle/")  # type: ignore[attr-defined]
raise pastkey.errors.InputError(pastkey.__version__)
