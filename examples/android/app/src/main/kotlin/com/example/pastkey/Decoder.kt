package com.example.pastkey

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import java.io.File
import java.nio.FloatBuffer
import java.nio.IntBuffer
import java.nio.LongBuffer

/** Token ids in, logits out: the graph of a bundle, and the cache of one text at a time. */
class Decoder(
    folder: File,
    private val manifest: Manifest,
    options: OrtSession.SessionOptions = OrtSession.SessionOptions(),
) : AutoCloseable {
    private val environment = OrtEnvironment.getEnvironment()
    private val session = environment.createSession(File(folder, manifest.graph).path, options)
    private var cache: Map<String, OnnxTensor> = emptyCache()
    private var owner = AutoCloseable { cache.values.forEach(OnnxTensor::close) } // of the cache's tensors

    /** The number of tokens in the cache. */
    var length = 0
        private set

    /** Forgets the text. */
    fun reset() {
        owner.close()
        val empty = emptyCache()
        cache = empty
        owner = AutoCloseable { empty.values.forEach(OnnxTensor::close) }
        length = 0
    }

    /** Takes further tokens (T). Returns the logits (V) of what follows the last one. */
    fun feed(tokens: LongArray): FloatArray {
        require(tokens.isNotEmpty() && tokens.all { it in 0 until manifest.vocabSize }) {
            "token ids are from 0 to ${manifest.vocabSize - 1}"
        }
        require(length + tokens.size <= manifest.contextLength) { "the context has ${manifest.contextLength} tokens" }
        val inputs = inputs(tokens)
        val result = try {
            session.run(inputs + cache) // what it returns is the next run's cache, without a copy
        } finally {
            inputs.values.forEach(OnnxTensor::close)
        }
        owner.close()
        owner = result
        cache = cache.mapValues { (name, _) -> result.get(present(name)).get() as OnnxTensor }
        length += tokens.size
        val logits = (result.get("logits").get() as OnnxTensor).floatBuffer
        logits.position(logits.limit() - manifest.vocabSize)
        return FloatArray(manifest.vocabSize).also { logits.get(it) }
    }

    /** Those of its inputs that the graph has: a fused one is told lengths, and for how many tokens to give logits. */
    private fun inputs(tokens: LongArray): Map<String, OnnxTensor> {
        val end = length + tokens.size
        val row = longArrayOf(1, tokens.size.toLong())
        val positions = LongArray(tokens.size) { (length + it).toLong() }
        val makers = mapOf(
            "input_ids" to { tensor(tokens, row) },
            "position_ids" to { tensor(positions, row) },
            "attention_mask" to { tensor(LongArray(end) { 1 }, longArrayOf(1, end.toLong())) },
            "seqlens_k" to { tensor(intArrayOf(end - 1), longArrayOf(1)) },
            "total_sequence_length" to { tensor(intArrayOf(end), longArrayOf()) },
            "evicted" to { tensor(intArrayOf(0), longArrayOf(1)) },
            "logits_start" to { tensor(longArrayOf(-1), longArrayOf(1)) },
        )
        return makers.filterKeys { it in session.inputNames }.mapValues { (_, make) -> make() }
    }

    private fun tensor(numbers: LongArray, shape: LongArray) =
        OnnxTensor.createTensor(environment, LongBuffer.wrap(numbers), shape)

    private fun tensor(numbers: IntArray, shape: LongArray) =
        OnnxTensor.createTensor(environment, IntBuffer.wrap(numbers), shape)

    /** Of no token: the axes that the graph leaves open are 1 row and 0 positions. */
    private fun emptyCache(): Map<String, OnnxTensor> =
        session.inputInfo.filterKeys { it.startsWith("past_") }.mapValues { (_, node) ->
            val shape = (node.info as TensorInfo).shape
            val sizes = LongArray(shape.size) { if (it == 0) 1 else maxOf(shape[it], 0) }
            OnnxTensor.createTensor(environment, FloatBuffer.allocate(0), sizes)
        }

    /** past_key_values.0.key -> present.0.key, past_conv.0 -> present_conv.0 */
    private fun present(past: String) = if (past.startsWith("past_key_values.")) {
        past.replace("past_key_values.", "present.")
    } else {
        past.replace("past_", "present_")
    }

    override fun close() {
        owner.close()
        session.close()
    }
}
