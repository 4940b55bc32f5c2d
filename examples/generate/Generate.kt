/*
 * A whole generation by one call of onnxruntime: token ids in, token ids out. Text is the application's.
 *
 * The package, in a build.gradle.kts (on a PC com.microsoft.onnxruntime:onnxruntime):
 *
 *     dependencies { implementation("com.microsoft.onnxruntime:onnxruntime-android:1.27.0") }
 *
 * Of a bundle by `pastkey export checkpoint --out bundle --generate`: generate.onnx and model*.onnx_data of onnx/, in
 * one folder. ../android/app/src/main/kotlin/com/example/pastkey/Download.kt shows how they come there.
 *
 * An application calls `generate`. `main` is for a PC: the graph, max_new_tokens, temperature, top_k, top_p, min_p,
 * repetition_penalty, seed, end ids in one word with spaces between them, and the prompt's ids.
 */
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.nio.FloatBuffer
import java.nio.LongBuffer

private val environment: OrtEnvironment = OrtEnvironment.getEnvironment()

/** The new ids behind those of `prompt`. `settings` has all others of the graph's inputs. */
fun generate(session: OrtSession, prompt: LongArray, settings: Map<String, OnnxTensor>): LongArray =
    OnnxTensor.createTensor(environment, arrayOf(prompt)).use { row ->
        session.run(settings + ("input_ids" to row)).use { result ->
            val ids = (result.get("ids").get() as OnnxTensor).longBuffer
            LongArray(ids.remaining()).also { ids.get(it) }
        }
    }

fun integers(vararg numbers: Long): OnnxTensor =
    OnnxTensor.createTensor(environment, LongBuffer.wrap(numbers), longArrayOf(numbers.size.toLong()))

fun number(number: Float): OnnxTensor =
    OnnxTensor.createTensor(environment, FloatBuffer.wrap(floatArrayOf(number)), longArrayOf(1))

private fun longs(words: List<String>) = words.filter { it.isNotEmpty() }.map { it.toLong() }.toLongArray()

fun main(words: Array<String>) {
    val settings = mapOf(
        "max_new_tokens" to integers(words[1].toLong()),
        "temperature" to number(words[2].toFloat()),
        "top_k" to integers(words[3].toLong()),
        "top_p" to number(words[4].toFloat()),
        "min_p" to number(words[5].toFloat()),
        "repetition_penalty" to number(words[6].toFloat()),
        "seed" to integers(words[7].toLong()),
        "end_ids" to integers(*longs(words[8].split(" ")))
    )
    environment.createSession(words[0], OrtSession.SessionOptions()).use { session ->
        println(generate(session, longs(words.drop(9)), settings).joinToString(" "))
    }
    settings.values.forEach { it.close() }
}
