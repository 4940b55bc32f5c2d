/*
 * A pastkey bundle on Android by plain onnxruntime: token ids in, token ids out. Text is the application's.
 *
 * In the module's build.gradle.kts (minSdk 24 or later):
 *
 *     dependencies { implementation("com.microsoft.onnxruntime:onnxruntime-android:1.27.0") }
 *     android { androidResources { noCompress += listOf("onnx", "onnx_data", "ort") } }
 *
 * In src/main/assets/bundle/, of the bundle: pastkey.json, and from its folder onnx/ either model*.onnx with its
 * model*.onnx_data or, of a bundle exported with --format ort by an onnxruntime no newer than 1.27, pastkey.ort alone.
 */
package com.example.pastkey

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import android.app.Activity
import android.content.Context
import android.os.Bundle
import android.widget.TextView
import java.io.File
import java.nio.FloatBuffer
import java.nio.IntBuffer
import java.nio.LongBuffer
import kotlin.concurrent.thread
import org.json.JSONObject

class MainActivity : Activity() {
    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        val view = TextView(this).also { setContentView(it) }
        thread {
            val shown = try {
                GreedyDecoder(unpacked(this, "bundle")).use { it.generate(longArrayOf(1, 2, 3), 24).joinToString(" ") }
            } catch (error: Exception) {
                error.toString()
            }
            runOnUiThread { view.text = shown }
        }
    }
}

/** The files of an assets folder as files of the application: onnxruntime finds the weights beside the graph's path. */
fun unpacked(context: Context, folder: String): File {
    val out = File(context.filesDir, folder).apply { mkdirs() }
    for (name in context.assets.list(folder).orEmpty()) {
        context.assets.open("$folder/$name").use { from -> File(out, name).outputStream().use { from.copyTo(it) } }
    }
    return out
}

/** The graph in `folder`, and its cache for one text at a time. */
class GreedyDecoder(folder: File, options: OrtSession.SessionOptions = OrtSession.SessionOptions()) : AutoCloseable {
    private val manifest = JSONObject(File(folder, "pastkey.json").readText())
    private val context = manifest.getInt("context_length")
    private val vocabulary = manifest.getLong("vocab_size")
    private val ends = manifest.getJSONArray("eos_token_ids").let { all -> List(all.length()) { all.getLong(it) } }
    private val environment = OrtEnvironment.getEnvironment()
    private val session: OrtSession

    init {
        val graph = folder.listFiles().orEmpty().single { it.extension == "onnx" || it.extension == "ort" }
        session = environment.createSession(graph.path, options)
    }

    /** The new ids, until one of the model's ends, `newTokens` of them, or the context. */
    fun generate(prompt: LongArray, newTokens: Int): List<Long> {
        require(prompt.isNotEmpty() && prompt.all { it in 0 until vocabulary }) { "ids are from 0 to ${vocabulary - 1}" }
        require(prompt.size <= context) { "the prompt has ${prompt.size} tokens, and the model's context $context" }
        val ids = mutableListOf<Long>()
        var tokens = prompt
        var length = 0
        var cache: Map<String, OnnxTensor> = emptyCache()
        var owner = AutoCloseable { cache.values.forEach(OnnxTensor::close) } // of the cache's tensors
        try {
            while (ids.size < newTokens && length + tokens.size <= context) {
                val inputs = inputs(tokens, length)
                val result = session.run(inputs + cache) // what it gives is the next run's cache, without a copy
                inputs.values.forEach(OnnxTensor::close)
                owner.close()
                owner = result
                cache = cache.mapValues { (name, _) -> result.get(present(name)).get() as OnnxTensor }
                length += tokens.size
                val token = likeliest(result.get("logits").get() as OnnxTensor)
                if (token in ends) break
                ids += token
                tokens = longArrayOf(token)
            }
        } finally {
            owner.close()
        }
        return ids
    }

    /** Those of its inputs that the graph has: pastkey.ort is told lengths, and how many logits to give. */
    private fun inputs(tokens: LongArray, length: Int): Map<String, OnnxTensor> {
        val end = length + tokens.size
        val row = longArrayOf(1, tokens.size.toLong())
        val positions = LongArray(tokens.size) { (length + it).toLong() }
        val makers = mapOf(
            "input_ids" to { tensor(tokens, row) },
            "position_ids" to { tensor(positions, row) },
            "attention_mask" to { tensor(LongArray(end) { 1 }, longArrayOf(1, end.toLong())) },
            "seqlens_k" to { OnnxTensor.createTensor(environment, IntBuffer.wrap(intArrayOf(end - 1)), longArrayOf(1)) },
            "total_sequence_length" to {
                OnnxTensor.createTensor(environment, IntBuffer.wrap(intArrayOf(end)), longArrayOf())
            },
            "logits_start" to { tensor(longArrayOf(-1), longArrayOf(1)) },
        )
        return makers.filterKeys { it in session.inputNames }.mapValues { (_, make) -> make() }
    }

    private fun tensor(row: LongArray, shape: LongArray) =
        OnnxTensor.createTensor(environment, LongBuffer.wrap(row), shape)

    /** Of no token: the axes that the graph leaves open are 1 row and 0 positions. */
    private fun emptyCache(): Map<String, OnnxTensor> =
        session.inputInfo.filterKeys { it.startsWith("past_") }.mapValues { (_, node) ->
            val shape = (node.info as TensorInfo).shape
            val sizes = LongArray(shape.size) { if (it == 0) 1 else maxOf(shape[it], 0) }
            OnnxTensor.createTensor(environment, FloatBuffer.allocate(0), sizes)
        }

    /** past_key_values.0.key -> present.0.key, past_conv.0 -> present_conv.0 */
    private fun present(past: String) =
        if (past.startsWith("past_key_values.")) past.replace("past_key_values.", "present.")
        else past.replace("past_", "present_")

    /** By the logits of the last position. */
    private fun likeliest(logits: OnnxTensor): Long {
        val values = logits.floatBuffer
        val start = values.limit() - vocabulary.toInt()
        return (0 until vocabulary.toInt()).maxByOrNull { values.get(start + it) }!!.toLong()
    }

    override fun close() = session.close()
}
