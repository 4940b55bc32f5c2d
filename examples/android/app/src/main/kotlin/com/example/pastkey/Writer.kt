package com.example.pastkey

import ai.djl.huggingface.tokenizers.HuggingFaceTokenizer
import java.io.File

/** Text in, text out: a bundle's tokenizer.json around its decoder. One text at a time, by one thread. */
class Writer(folder: File) : AutoCloseable {
    class Result(val tokens: Int, val ending: Ending)

    enum class Ending { END_OF_TEXT, LENGTH, STOPPED }

    private val manifest = Manifest(File(folder, Manifest.NAME).readText())
    private val decoder = Decoder(folder, manifest)

    init {
        System.setProperty("OPT_OUT_TRACKING", "true") // or DJL tells its makers of its use, on Amazon's machines
    }

    private val tokenizer = HuggingFaceTokenizer.newInstance(
        File(folder, Manifest.TOKENIZER).toPath(),
        mapOf("truncation" to "do_not_truncate", "padding" to "do_not_pad"), // or it cuts a prompt at 512 tokens
    )

    /**
     * Goes on from [prompt], until the model ends the text, [maxNewTokens] or the end of the context.
     *
     * [onText] gets each new piece, in whole characters. [cancelled] is asked before each run of the graph, which has
     * at most 64 tokens.
     */
    fun write(
        prompt: String,
        sampling: Sampling,
        maxNewTokens: Int,
        cancelled: () -> Boolean,
        onText: (String) -> Unit,
    ): Result {
        val ids = tokenizer.encode(prompt, true, false).ids.toMutableList()
        val start = ids.size
        require(start in 1..manifest.contextLength) {
            "the prompt has $start tokens, the context ${manifest.contextLength}"
        }
        decoder.reset()
        var written = textOf(ids).length
        while (true) {
            var logits = FloatArray(0)
            for (chunk in ids.drop(decoder.length).chunked(CHUNK)) {
                if (cancelled()) return Result(ids.size - start, Ending.STOPPED)
                logits = decoder.feed(chunk.toLongArray())
            }
            val token = sampling.next(logits, ids)
            if (token in manifest.eosTokenIds) return Result(ids.size - start, Ending.END_OF_TEXT)
            if (ids.size - start == maxNewTokens) return Result(maxNewTokens, Ending.LENGTH)
            ids += token
            val text = textOf(ids)
            if (!text.endsWith(INCOMPLETE) && text.length > written) {
                onText(text.substring(written))
                written = text.length
            }
            if (ids.size > manifest.contextLength) return Result(ids.size - start, Ending.LENGTH)
        }
    }

    /** Of all ids: a token's text may depend on those before it. */
    private fun textOf(ids: List<Long>): String = tokenizer.decode(ids.toLongArray(), true)

    override fun close() {
        decoder.close()
        tokenizer.close()
    }

    private companion object {
        const val CHUNK = 64
        const val INCOMPLETE = '\uFFFD' // the bytes of a character that has not come whole
    }
}
