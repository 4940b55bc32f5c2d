import Foundation
#if canImport(OnnxRuntimeBindings)
import OnnxRuntimeBindings
#else
import onnxruntime_objc
#endif

/// Token ids in, logits out: the graph of a bundle, and the cache of one text at a time.
final class GraphDecoder {
    private let manifest: Manifest
    private let environment: ORTEnv
    private let session: ORTSession
    private let names: Set<String> // of the graph's inputs
    private let outputs: Set<String>
    private var cache: [String: ORTValue] = [:]
    /// The number of tokens in the cache.
    private(set) var length = 0

    init(bundle: URL, manifest: Manifest) throws {
        self.manifest = manifest
        environment = try ORTEnv(loggingLevel: .error)
        let path = bundle.appendingPathComponent(try manifest.graph()).path
        session = try ORTSession(env: environment, modelPath: path, sessionOptions: ORTSessionOptions())
        names = Set(try session.inputNames())
        outputs = Set(try session.outputNames())
        try reset()
    }

    /// Forgets the text.
    func reset() throws {
        cache = try emptyCache()
        length = 0
    }

    /// Takes further tokens (T). Returns the logits (V) of what follows the last one.
    func feed(_ tokens: [Int]) throws -> [Float] {
        let inputs = try inputs(tokens).merging(cache) { input, _ in input }
        let result = try session.run(withInputs: inputs, outputNames: outputs, runOptions: nil)
        for past in cache.keys { // what it returns is the next run's cache, without a copy
            cache[past] = try output(result, Self.present(past))
        }
        length += tokens.count
        return try (output(result, "logits").tensorData() as Data).withUnsafeBytes { bytes in
            Array(bytes.bindMemory(to: Float.self).suffix(manifest.vocab_size))
        }
    }

    /// Those of its inputs that the graph has: a fused one is told lengths, and for how many tokens to give logits.
    private func inputs(_ tokens: [Int]) throws -> [String: ORTValue] {
        let end = length + tokens.count
        let row = [1, NSNumber(value: tokens.count)]
        let known = [
            "input_ids": try value(tokens.map(Int64.init), .int64, shape: row),
            "position_ids": try value((length..<end).map(Int64.init), .int64, shape: row),
            "attention_mask": try value([Int64](repeating: 1, count: end), .int64, shape: [1, NSNumber(value: end)]),
            "seqlens_k": try value([Int32(end - 1)], .int32, shape: [1]),
            "total_sequence_length": try value([Int32(end)], .int32, shape: []),
            "evicted": try value([Int32(0)], .int32, shape: [1]),
            "logits_start": try value([Int64(-1)], .int64, shape: [1]),
        ]
        return known.filter { names.contains($0.key) }
    }

    private func value<T>(_ numbers: [T], _ type: ORTTensorElementDataType, shape: [NSNumber]) throws -> ORTValue {
        let data = numbers.withUnsafeBytes { NSMutableData(bytes: $0.baseAddress!, length: $0.count) }
        return try ORTValue(tensorData: data, elementType: type, shape: shape)
    }

    /// Of no token: 1 row and 0 positions.
    private func emptyCache() throws -> [String: ORTValue] {
        var shapes: [String: [Int]] = [:]
        for (i, layer) in manifest.layers.enumerated() {
            shapes["past_key_values.\(i).key"] = [1, layer.kv_heads, 0, layer.key_head_size]
            shapes["past_key_values.\(i).value"] = [1, layer.kv_heads, 0, layer.value_head_size]
        }
        for (i, kept) in manifest.rows.enumerated() {
            shapes["past_conv.\(i)"] = [1, 0, kept.size]
        }
        return try shapes.mapValues { shape in
            let data = NSMutableData(length: MemoryLayout<Float>.size)! // memory of no bytes may have no address
            return try ORTValue(tensorData: data, elementType: .float, shape: shape.map { NSNumber(value: $0) })
        }
    }

    /// past_key_values.0.key -> present.0.key, past_conv.0 -> present_conv.0
    private static func present(_ past: String) -> String {
        past.hasPrefix("past_key_values.")
            ? past.replacingOccurrences(of: "past_key_values.", with: "present.")
            : past.replacingOccurrences(of: "past_", with: "present_")
    }

    private func output(_ result: [String: ORTValue], _ name: String) throws -> ORTValue {
        guard let value = result[name] else { throw WriterError.noOutput(name) }
        return value
    }
}
