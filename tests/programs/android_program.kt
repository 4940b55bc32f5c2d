// examples/android on a PC, without its view: a line of JSON comes in for each call, and one goes out.
// ARGUMENTS: the address of a bundle's folder, an empty folder, the SHA-256 of pastkey.json or "".
import com.example.pastkey.Sampling
import com.example.pastkey.Writer
import com.example.pastkey.download
import java.io.File
import org.json.JSONArray
import org.json.JSONObject

fun main(words: Array<String>) {
    val folder = File(words[1])
    try {
        download(words[0], folder, words[2], { false }, { _, _ -> })
    } catch (error: Exception) {
        println(JSONObject(mapOf("error" to error.message)))
        return
    }
    Writer(folder).use { writer ->
        generateSequence(::readlnOrNull).forEach { line -> println(answer(writer, JSONObject(line))) }
    }
}

fun answer(writer: Writer, call: JSONObject): JSONObject {
    val pieces = JSONArray()
    val stopAfter = call.optInt("stop_after", Int.MAX_VALUE)
    return try {
        val sampling = Sampling(
            call.getDouble("temperature").toFloat(),
            call.getInt("top_k"),
            call.getDouble("top_p").toFloat(),
            call.getDouble("min_p").toFloat(),
            call.getDouble("repetition_penalty").toFloat(),
            call.getLong("seed"),
        )
        if (call.has("logits")) return JSONObject(mapOf("token" to drawn(sampling, call)))
        val result = writer.write(
            call.getString("prompt"), sampling, call.getInt("max_new_tokens"), { pieces.length() >= stopAfter },
        ) { pieces.put(it) }
        JSONObject(mapOf("pieces" to pieces, "tokens" to result.tokens, "ending" to result.ending.toString()))
    } catch (error: Exception) {
        JSONObject(mapOf("error" to error.message))
    }
}

fun drawn(sampling: Sampling, call: JSONObject): Long {
    val logits = call.getJSONArray("logits")
    val ids = call.getJSONArray("ids")
    return sampling.next(
        FloatArray(logits.length()) { logits.getDouble(it).toFloat() }, List(ids.length()) { ids.getLong(it) },
    )
}
