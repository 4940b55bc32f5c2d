package com.example.pastkey

import org.json.JSONObject

/** What the application reads of a bundle's pastkey.json. */
class Manifest(text: String) {
    class Record(val path: String, val size: Long, val sha256: String)

    private val json = JSONObject(text)
    val contextLength = json.getInt("context_length")
    val vocabSize = json.getInt("vocab_size")
    val eosTokenIds = json.getJSONArray("eos_token_ids").let { ids -> List(ids.length()) { ids.getLong(it) } }
    private val files = json.getJSONObject("files").let { all ->
        all.keys().asSequence().toList().map { path ->
            all.getJSONObject(path).let { Record(path, it.getLong("size"), it.getString("sha256")) }
        }
    }

    /** The graph of the last logits: with its weights in one file, or with `onnx/…onnx_data` beside it. */
    val graph = listOf("onnx/pastkey.ort", "onnx/pastkey.onnx").firstOrNull { path -> files.any { it.path == path } }
        ?: throw IllegalArgumentException("the bundle has no onnx/pastkey.onnx: export it without --graph static")

    /** The files that the application loads. */
    val needed = files.filter {
        it.path == graph || it.path == TOKENIZER || (graph.endsWith(".onnx") && WEIGHTS.matches(it.path))
    }

    init {
        require(needed.any { it.path == TOKENIZER }) { "the bundle has no $TOKENIZER" }
        require(json.getString("precision") != "fp16") { "the caches here are float32: export in int8, int4 or fp32" }
    }

    companion object {
        const val NAME = "pastkey.json"
        const val TOKENIZER = "tokenizer.json"
        private val WEIGHTS = Regex("onnx/[\\w.-]+\\.onnx_data")
    }
}
