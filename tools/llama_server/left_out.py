"""What of llama.cpp's server tests does not apply to `pastkey serve`, and why."""

from __future__ import annotations

SLOW = "marked slow there: needs models of several gigabytes"
MODEL = "needs another model than stories260K"
NATIVE = "llama.cpp's own fields or routes, which OpenAI's API has not"
SLOTS = "slots: a bundle's engine has none; its places are not told apart"
NAMED = "a chat template that llama.cpp knows by name; a bundle brings its own"
ROUTER = "a router over several models; a server has one bundle"
OTHER_API = "another vendor's API"

# part of a test's id -> reason.
LEFT_OUT = {
    "test_compat_anthropic.py": OTHER_API,
    "test_compat_gcp.py": OTHER_API,
    "test_embedding.py": MODEL,
    "test_infill.py": MODEL,
    "test_lora.py": MODEL,
    "test_rerank.py": MODEL,
    "test_speculative.py": MODEL,
    "test_vision_api.py": MODEL,
    "test_kv_keep_only_active.py": SLOTS,
    "test_slot_save.py": SLOTS,
    "test_mcp_servers.py": "tools that the server runs itself",
    "test_tools_builtin.py": "tools that the server runs itself",
    "test_proxy.py": ROUTER,
    "test_router.py": ROUTER,
    "test_stream.py": ROUTER,
    "test_sleep.py": "unloads an idle model",
    "test_metrics.py": "metrics by llama.cpp's names",
}

# Regexes of texts that llama.cpp's random stream decides: drawn at temperature 0.8 with the seed 42.
RANDOM_TEXTS = frozenset(
    {
        "But she couldn't",
        '(Suddenly)+|\\{ " Sarax.',
        "^ blue",
        "(Aside|she|felter|alonger)+",
        "Whillicter",
        "(Suddenly)+",
        "(going|bed)+",
        "(princesses|everyone|kids|Anna|forest)+",
        "(\\{|John)+",
        "[ -3000 ]",
    }
)
