package com.example.pastkey

import java.util.PriorityQueue
import kotlin.math.exp
import kotlin.math.ln
import kotlin.random.Random

/**
 * From logits to a token, as docs/output.md of pastkey defines it. The defaults take the likeliest token.
 *
 * A draw depends on the logits, the seed and the place in the text alone: in float32 a seed draws Python's text.
 */
class Sampling(
    private val temperature: Float = 0f,
    private val topK: Int = 0,
    private val topP: Float = 1f,
    private val minP: Float = 0f,
    private val repetitionPenalty: Float = 1f,
    private val seed: Long = Random.nextLong(Long.MAX_VALUE),
) {
    init {
        require(temperature >= 0) { "temperature is $temperature; it must be 0 or more" }
        require(topK >= 0) { "topK is $topK; it must be 0, which keeps all tokens, or more" }
        require(topP > 0 && topP <= 1) { "topP is $topP; it must be above 0 and at most 1" }
        require(minP in 0f..1f) { "minP is $minP; it must be from 0 to 1" }
        require(repetitionPenalty > 0) { "repetitionPenalty is $repetitionPenalty; it must be above 0" }
        require(seed >= 0) { "seed is $seed; it must be 0 or more" }
    }

    /** The token after [ids], prompt included, by the [logits] (V), which stay unchanged. */
    fun next(logits: FloatArray, ids: List<Long>): Long {
        val scores = DoubleArray(logits.size) { logits[it].toDouble() }
        if (repetitionPenalty != 1f) {
            for (id in ids.toSet()) {
                val score = scores[id.toInt()]
                scores[id.toInt()] = if (score > 0) score / repetitionPenalty else score * repetitionPenalty
            }
        }
        val likeliest = likeliest(scores)
        if (temperature == 0f) return likeliest.toLong()
        val largest = scores[likeliest]
        for (id in scores.indices) scores[id] = (scores[id] - largest) / temperature
        var kept = IntArray(scores.size) { it }
        if (topK in 1 until kept.size) kept = largestOf(kept, scores, topK)
        if (topP < 1) kept = nucleus(kept, scores)
        if (minP > 0) kept = kept.filter { scores[it] >= ln(minP.toDouble()) }.toIntArray()
        return drawn(kept, scores, uniform(seed, ids.size)).toLong()
    }

    private fun likeliest(scores: DoubleArray): Int {
        var best = 0
        for (id in scores.indices) if (scores[id] > scores[best]) best = id
        return best
    }

    /** The [count] largest, and those that equal the last of them. */
    private fun largestOf(kept: IntArray, scores: DoubleArray, count: Int): IntArray {
        val queue = PriorityQueue<Double>(count)
        for (id in kept) {
            if (queue.size < count) {
                queue.add(scores[id])
            } else if (scores[id] > queue.peek()!!) {
                queue.poll()
                queue.add(scores[id])
            }
        }
        val last = queue.peek()!!
        return kept.filter { scores[it] >= last }.toIntArray()
    }

    /** The fewest likeliest that reach `topP` together. Those below (1 - topP) / V cannot be among them. */
    private fun nucleus(kept: IntArray, scores: DoubleArray): IntArray {
        val probabilities = probabilities(kept, scores)
        val least = (1 - topP.toDouble()) / scores.size
        val order = kept.indices.filter { probabilities[it] >= least }.sortedByDescending { probabilities[it] }
        var before = 0.0
        val first = order.takeWhile { place -> (before < topP).also { before += probabilities[place] } }
        return first.map { kept[it] }.sorted().toIntArray()
    }

    private fun probabilities(kept: IntArray, scores: DoubleArray): DoubleArray {
        val exponentials = DoubleArray(kept.size) { exp(scores[kept[it]]) }
        val total = exponentials.sum()
        return DoubleArray(kept.size) { exponentials[it] / total }
    }

    private fun drawn(kept: IntArray, scores: DoubleArray, u: Double): Int {
        val sums = probabilities(kept, scores)
        for (place in 1 until sums.size) sums[place] += sums[place - 1]
        return kept[sums.indexOfFirst { it / sums.last() > u }]
    }
}

private val ROTATIONS = arrayOf(intArrayOf(13, 15, 26, 6), intArrayOf(17, 29, 16, 24))

/** The number in [0, 1) of the token with `place` tokens before it: Threefry2x32 (docs/bundle-format.md). */
fun uniform(seed: Long, place: Int): Double {
    val low = seed.toInt()
    val high = (seed ushr 32).toInt()
    val keys = intArrayOf(low, high, low xor high xor 0x1BD11BDA)
    var x = place + keys[0]
    var y = keys[1] // the lane is 0
    for (group in 0 until 5) {
        for (rotation in ROTATIONS[group % 2]) {
            x += y
            y = y.rotateLeft(rotation) xor x
        }
        x += keys[(group + 1) % 3]
        y += keys[(group + 2) % 3] + group + 1
    }
    return (((x ushr 5).toLong() shl 26) + (y ushr 6)).toDouble() / (1L shl 53)
}
