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

    /** One file with its weights, or the graph for every program, with `onnx/…onnx_data` next to it. */
    val graph: String

    /** The files that the application loads. */
    val needed: List<Record>

    init {
        val paths = files.map { it.path }
        graph = requireNotNull(paths.find { it == "onnx/pastkey.ort" } ?: paths.find(GRAPH::matches)) {
            "the bundle has no onnx/model….onnx: export it without --graph static"
        }
        needed = files.filter {
            it.path == graph || it.path == TOKENIZER || (graph.endsWith(".onnx") && WEIGHTS.matches(it.path))
        }
        require(needed.any { it.path == TOKENIZER }) { "the bundle has no $TOKENIZER" }
        require(json.getString("precision") != "fp16") { "the caches here are float32: export in int8, int4 or fp32" }
    }

    companion object {
        const val NAME = "pastkey.json"
        const val TOKENIZER = "tokenizer.json"
        private val GRAPH = Regex("onnx/model\\w*\\.onnx")
        private val WEIGHTS = Regex("onnx/[\\w.-]+\\.onnx_data(_\\d+)?")
    }
}
