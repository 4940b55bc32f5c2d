package com.example.pastkey

import java.io.ByteArrayOutputStream
import java.io.File
import java.io.IOException
import java.io.InputStream
import java.net.HttpURLConnection
import java.net.URI
import java.security.MessageDigest

private const val LARGEST_MANIFEST = 16_000_000

/**
 * Brings a bundle from [url] into [folder]: pastkey.json, and the files it names that the application loads.
 *
 * Every file is checked against the size and hash in pastkey.json, which comes last: a folder that has it is whole. A
 * second call keeps the files that are right already. With [manifestSha256] the manifest is checked too, so that
 * nothing else can be loaded than what the application was made with.
 *
 * [progress] gets the bytes so far and all bytes. Throws IOException, where [cancelled] says so as well.
 */
fun download(
    url: String,
    folder: File,
    manifestSha256: String,
    cancelled: () -> Boolean,
    progress: (Long, Long) -> Unit,
): Manifest {
    val content = opened("$url/${Manifest.NAME}").use { it.readAtMost(LARGEST_MANIFEST) }
    if (manifestSha256.isNotEmpty() && hex(MessageDigest.getInstance("SHA-256").digest(content)) != manifestSha256) {
        throw IOException("${Manifest.NAME} has another SHA-256 than $manifestSha256")
    }
    val manifest = Manifest(content.decodeToString())
    val missing = manifest.needed.filterNot { isThere(File(folder, it.path), it) }
    val all = missing.sumOf { it.size }
    folder.mkdirs()
    if (folder.usableSpace < all) throw IOException("$all bytes are needed, and ${folder.usableSpace} are free")
    var before = 0L
    for (record in missing) {
        val file = File(folder, record.path).apply { parentFile!!.mkdirs() }
        val part = File(folder, "${record.path}.part")
        val sha256 = opened("$url/${record.path}").use { from ->
            copied(from, part, record, cancelled) { progress(before + it, all) }
        }
        if (sha256 != record.sha256) {
            part.delete()
            throw IOException("${record.path} has another SHA-256 than ${Manifest.NAME} says: it was altered")
        }
        if (!part.renameTo(file)) throw IOException("${record.path} could not be written")
        before += record.size
    }
    File(folder, "${Manifest.NAME}.part").apply { writeBytes(content) }.renameTo(File(folder, Manifest.NAME))
    return manifest
}

private fun opened(url: String): InputStream {
    val connection = URI(url).toURL().openConnection() as HttpURLConnection
    connection.connectTimeout = 15_000
    connection.readTimeout = 30_000
    if (connection.responseCode != HttpURLConnection.HTTP_OK) {
        throw IOException("$url answers ${connection.responseCode}")
    }
    return connection.inputStream
}

/** Writes a file, no longer than it may be. Returns its hash. */
private fun copied(
    from: InputStream,
    part: File,
    record: Manifest.Record,
    cancelled: () -> Boolean,
    progress: (Long) -> Unit,
): String {
    val digest = MessageDigest.getInstance("SHA-256")
    var length = 0L
    part.outputStream().use { out ->
        val buffer = ByteArray(1 shl 16)
        while (true) {
            val count = from.read(buffer)
            if (count < 0) break
            if (cancelled()) throw IOException("the download was stopped")
            length += count
            if (length > record.size) throw IOException("${record.path} is longer than ${record.size} bytes")
            out.write(buffer, 0, count)
            digest.update(buffer, 0, count)
            progress(length)
        }
    }
    return hex(digest.digest())
}

private fun isThere(file: File, record: Manifest.Record): Boolean {
    if (file.length() != record.size) return false
    val digest = MessageDigest.getInstance("SHA-256")
    file.inputStream().use { from ->
        val buffer = ByteArray(1 shl 16)
        while (true) digest.update(buffer, 0, from.read(buffer).takeIf { it >= 0 } ?: break)
    }
    return hex(digest.digest()) == record.sha256
}

private fun InputStream.readAtMost(most: Int): ByteArray {
    val out = ByteArrayOutputStream()
    val buffer = ByteArray(1 shl 16)
    while (true) {
        val count = read(buffer)
        if (count < 0) return out.toByteArray()
        out.write(buffer, 0, count)
        if (out.size() > most) throw IOException("the manifest is longer than $most bytes")
    }
}

private fun hex(bytes: ByteArray) = bytes.joinToString("") { "%02x".format(it) }
