import Foundation

/// From logits to a token, as docs/output.md of pastkey defines it. The defaults take the likeliest token.
///
/// A draw depends on the logits, the seed and the place in the text alone: in float32 a seed draws Python's text.
public struct Sampling: Sendable {
    let temperature, topP, minP, repetitionPenalty: Float
    let topK: Int
    let seed: UInt64

    public init(
        temperature: Float = 0, topK: Int = 0, topP: Float = 1, minP: Float = 0, repetitionPenalty: Float = 1,
        seed: UInt64 = .random(in: 0...UInt64(Int64.max))
    ) throws {
        guard temperature >= 0 else { throw WriterError.badSetting("temperature") }
        guard topK >= 0 else { throw WriterError.badSetting("topK") }
        guard topP > 0, topP <= 1 else { throw WriterError.badSetting("topP") }
        guard (0...1).contains(minP) else { throw WriterError.badSetting("minP") }
        guard repetitionPenalty > 0 else { throw WriterError.badSetting("repetitionPenalty") }
        guard seed <= Int64.max else { throw WriterError.badSetting("seed") }
        (self.temperature, self.topK, self.topP, self.minP) = (temperature, topK, topP, minP)
        (self.repetitionPenalty, self.seed) = (repetitionPenalty, seed)
    }

    /// The token after `ids`, prompt included, by the logits (V).
    func next(_ logits: [Float], after ids: [Int]) -> Int {
        var scores = logits.map(Double.init)
        if repetitionPenalty != 1 {
            for id in Set(ids) {
                scores[id] = scores[id] > 0 ? scores[id] / Double(repetitionPenalty) : scores[id] * Double(repetitionPenalty)
            }
        }
        var likeliest = 0
        for id in scores.indices where scores[id] > scores[likeliest] { likeliest = id }
        if temperature == 0 { return likeliest }
        let largest = scores[likeliest]
        for id in scores.indices { scores[id] = (scores[id] - largest) / Double(temperature) }
        var kept = Array(scores.indices)
        if topK > 0, topK < kept.count {
            let last = scores.sorted(by: >)[topK - 1] // those that equal the last one stay
            kept = kept.filter { scores[$0] >= last }
        }
        if topP < 1 { kept = nucleus(kept, scores) }
        if minP > 0 { kept = kept.filter { scores[$0] >= log(Double(minP)) } }
        return drawn(kept, scores, uniform(seed: seed, place: ids.count))
    }

    /// The fewest likeliest that reach `topP` together. Those below (1 - topP) / V cannot be among them.
    private func nucleus(_ kept: [Int], _ scores: [Double]) -> [Int] {
        let probabilities = probabilities(kept, scores)
        let least = (1 - Double(topP)) / Double(scores.count)
        let order = kept.indices.filter { probabilities[$0] >= least }
            .sorted { (-probabilities[$0], $0) < (-probabilities[$1], $1) }
        var before = 0.0
        let first = order.prefix { place in
            defer { before += probabilities[place] }
            return before < Double(topP)
        }
        return first.map { kept[$0] }.sorted()
    }

    private func probabilities(_ kept: [Int], _ scores: [Double]) -> [Double] {
        let exponentials = kept.map { exp(scores[$0]) }
        let total = exponentials.reduce(0, +)
        return exponentials.map { $0 / total }
    }

    private func drawn(_ kept: [Int], _ scores: [Double], _ u: Double) -> Int {
        var sums = probabilities(kept, scores)
        for place in sums.indices.dropFirst() { sums[place] += sums[place - 1] }
        let total = sums.last!
        return kept[sums.firstIndex { $0 / total > u }!]
    }
}

/// The number in [0, 1) of the token with `place` tokens before it: Threefry2x32 (docs/bundle-format.md).
func uniform(seed: UInt64, place: Int) -> Double {
    let rotations: [[UInt32]] = [[13, 15, 26, 6], [17, 29, 16, 24]]
    let (low, high) = (UInt32(truncatingIfNeeded: seed), UInt32(truncatingIfNeeded: seed >> 32))
    let keys = [low, high, low ^ high ^ 0x1BD1_1BDA]
    var (x, y) = (UInt32(place) &+ keys[0], keys[1]) // the lane is 0
    for group in 0..<5 {
        for rotation in rotations[group % 2] {
            x &+= y
            y = (y << rotation | y >> (32 - rotation)) ^ x
        }
        x &+= keys[(group + 1) % 3]
        y &+= keys[(group + 2) % 3] &+ UInt32(group + 1)
    }
    return Double(UInt64(x >> 5) << 26 + UInt64(y >> 6)) * 0x1p-53
}
