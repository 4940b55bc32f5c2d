package com.example.pastkey

import android.app.Activity
import android.os.Bundle
import android.view.View
import android.widget.Button
import android.widget.EditText
import android.widget.ScrollView
import android.widget.SeekBar
import android.widget.TextView
import java.io.File
import java.util.concurrent.Executors

/** Brings the bundle at the first use, and shows a text as it is written. */
class MainActivity : Activity() {
    private val worker = Executors.newSingleThreadExecutor()
    private var writer: Writer? = null // the worker's
    private var working = false

    @Volatile
    private var cancelled = false

    private val prompt by lazy { findViewById<EditText>(R.id.prompt) }
    private val temperature by lazy { findViewById<SeekBar>(R.id.temperature) }
    private val topP by lazy { findViewById<SeekBar>(R.id.top_p) }
    private val button by lazy { findViewById<Button>(R.id.write) }
    private val status by lazy { findViewById<TextView>(R.id.status) }
    private val scroll by lazy { findViewById<ScrollView>(R.id.scroll) }
    private val text by lazy { findViewById<TextView>(R.id.text) }

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContentView(R.layout.main)
        labelled(temperature, R.id.temperature_label, R.string.temperature, 10f)
        labelled(topP, R.id.top_p_label, R.string.top_p, 100f)
        button.setOnClickListener { if (working) cancelled = true else write() }
    }

    override fun onDestroy() {
        cancelled = true
        worker.execute { writer?.close() }
        worker.shutdown()
        super.onDestroy()
    }

    private fun write() {
        val beginning = prompt.text.toString()
        val sampling = Sampling(temperature.progress / 10f, topP = maxOf(1, topP.progress) / 100f)
        cancelled = false
        show(true, "")
        text.text = beginning
        worker.execute {
            val told = try {
                written(beginning, sampling)
            } catch (error: Exception) { // of the network, of the bundle
                error.message ?: error.toString()
            }
            runOnUiThread { show(false, told) }
        }
    }

    /** On the worker. Returns what is to be said at the end. */
    private fun written(beginning: String, sampling: Sampling): String {
        val writer = writer ?: opened().also { writer = it }
        val start = System.nanoTime()
        val result = writer.write(beginning, sampling, NEW_TOKENS, { cancelled }) { piece ->
            runOnUiThread {
                text.append(piece)
                scroll.post { scroll.fullScroll(View.FOCUS_DOWN) }
            }
        }
        val perSecond = result.tokens / ((System.nanoTime() - start) / 1e9)
        return getString(R.string.ended, result.tokens, perSecond, result.ending.toString().lowercase())
    }

    private fun opened(): Writer {
        val folder = File(filesDir, "bundle")
        if (!File(folder, Manifest.NAME).exists()) {
            require(BuildConfig.BUNDLE_URL.isNotEmpty()) { "gradle.properties has no pastkey.url" }
            download(BuildConfig.BUNDLE_URL, folder, BuildConfig.MANIFEST_SHA256, { cancelled }) { done, all ->
                val told = getString(R.string.progress, done / MEGABYTE, all / MEGABYTE)
                runOnUiThread { status.text = told }
            }
        }
        return Writer(folder)
    }

    private fun show(working: Boolean, told: String) {
        this.working = working
        button.setText(if (working) R.string.stop else R.string.write)
        status.text = told
    }

    private fun labelled(bar: SeekBar, label: Int, text: Int, scale: Float) {
        fun show() = findViewById<TextView>(label).setText(getString(text, bar.progress / scale))
        bar.setOnSeekBarChangeListener(object : SeekBar.OnSeekBarChangeListener {
            override fun onProgressChanged(bar: SeekBar, progress: Int, fromUser: Boolean) = show()

            override fun onStartTrackingTouch(bar: SeekBar) = Unit

            override fun onStopTrackingTouch(bar: SeekBar) = Unit
        })
        show()
    }

    private companion object {
        const val NEW_TOKENS = 400
        const val MEGABYTE = 1_000_000
    }
}
