"""What of llama.cpp's server tests does not apply to `pastkey serve`, and why."""

from __future__ import annotations

SLOW = "marked slow there: models of several gigabytes"
MODEL = "another model than stories260K"
FIELDS = "llama.cpp's own fields or routes, which OpenAI's API has not"
SLOTS = "slots: a bundle's engine has none"
TEMPLATE = "a chat template of llama.cpp's own: a bundle brings its own, which writes BOS"
ROUTER = "a router over several models: a server has one bundle"
TOOLS = "tools that the server runs itself"
OTHER_API = "another vendor's API"
CORS = "llama.cpp allows every origin by default, pastkey none"

# A regex that is searched in a test's id -> reason. Each must find a test.
LEFT_OUT = {
    r"test_compat_(anthropic|gcp)": OTHER_API,
    r"test_(embedding|infill|lora|rerank|speculative|vision_api)\.py": MODEL,
    r"test_load_split_model|test_local_media_file|mtm_error": MODEL,
    r"test_(mcp_servers|tools_builtin)\.py": TOOLS,
    r"test_(proxy|router|stream)\.py|test_cors_origins|test_cors_proxy": ROUTER,
    r"test_(kv_keep_only_active|slot_save)\.py|test_server_slots|test_cancel_request": SLOTS,
    r"test_chat_completion_cached_tokens": "pastkey computes the last two tokens of a cached prompt, llama.cpp one",
    r"test_sleep\.py": "unloads an idle model",
    r"test_metrics\.py": "metrics by llama.cpp's names",
    r"test_ctx_shift\.py|test_ignore_eos\.py|test_server_props|test_server_model_aliases_and_tags": FIELDS,
    r"test_completion\.py::test_(completion(_stream)?\[|json_prompt_no|completion_response_fields|n_probs)": FIELDS,
    r"test_completion_(with_tokens_input|prompt_cache)|test_logit_bias\[False": FIELDS,
    r"timings_per_token|test_return_progress|token_count|test_verbose_debug|llama_telemetry|size_exceeded": FIELDS,
    r"test_chat_template\[?$|assistant_prefill|vllm_compat|test_apply_chat_template|not a chat template": TEMPLATE,
    r"test_reasoning\[.*-(on|off)-": "switches reasoning on and off by reading the template",
    r"test_reasoning\[(deepseek|Qwen-QwQ|Cohere).*-auto-|test_date_inside": (
        "variables that llama.cpp gives to templates, and transformers does not: enable_thinking, date_string, datetime"
    ),
    r"test_add_generation_prompt": FIELDS,
    r"test_completion_with_grammar\[": "grammars in GBNF: pastkey takes Lark",
    r"test_invalid_chat_completion_req\[messages7": "the order of roles is the template's matter",
    r"without_tool_call_fast\[.*-tools1-": "a prompt of 728 tokens: the model was trained with 512",
    r"test_server_multiple_addresses": "a server listens on one address",
    r"test_no_ui|test_access_static_assets": "llama.cpp's page",
    r"test_cors_options": CORS,
}

# Regexes of texts that llama.cpp's random stream decides: drawn at temperature 0.8 with the seed 42.
RANDOM_TEXTS = {
    "But she couldn't", '(Suddenly)+|\\{ " Sarax.', "^ blue", "(Aside|she|felter|alonger)+", "Whillicter", "(Suddenly)+",
    "(going|bed)+", "(princesses|everyone|kids|Anna|forest)+", "(\\{|John)+", "[ -3000 ]",
}  # fmt: skip
