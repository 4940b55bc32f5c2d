// A pastkey bundle on iOS by plain onnxruntime: token ids in, token ids out. Text is the application's.
//
// The package, in Xcode by File > Add Package Dependencies, or in a Package.swift:
//
//     .package(url: "https://github.com/microsoft/onnxruntime-swift-package-manager", exact: "1.24.2")
//     .product(name: "onnxruntime", package: "onnxruntime-swift-package-manager")
//
// or by CocoaPods, where the module is called onnxruntime_objc:
//
//     pod 'onnxruntime-objc', '1.24.3'
//
// Of the bundle, as a folder reference in the application: pastkey.json and the folder onnx/ with model*.onnx and its
// model*.onnx_data; or, of a bundle exported with --format ort by an onnxruntime no newer than the package's,
// pastkey.json and onnx/pastkey.ort.
//
//     let folder = Bundle.main.url(forResource: "bundle", withExtension: nil)!
//     let ids = try GreedyDecoder(bundle: folder).generate(prompt: [1, 2, 3], newTokens: 24)

import Foundation
#if canImport(OnnxRuntimeBindings)
import OnnxRuntimeBindings
#else
import onnxruntime_objc
#endif

/// What is read of pastkey.json.
struct Manifest: Decodable {
    struct Layer: Decodable { let kv_heads, key_head_size, value_head_size: Int }
    struct State: Decodable { let rows, size: Int }
    let vocab_size, context_length: Int
    let layers: [Layer]
    let states: [State]
    let eos_token_ids: [Int64]
}

enum GreedyError: Error {
    case noGraph
    case badPrompt(lastId: Int)
    case longPrompt(context: Int)
    case noOutput(String)
}

final class GreedyDecoder {
    private let manifest: Manifest
    private let environment: ORTEnv
    private let session: ORTSession
    private let names: Set<String> // of the graph's inputs
    private let outputs: Set<String>

    init(bundle: URL) throws {
        let content = try Data(contentsOf: bundle.appendingPathComponent("pastkey.json"))
        manifest = try JSONDecoder().decode(Manifest.self, from: content)
        let files = try FileManager.default.contentsOfDirectory(
            at: bundle.appendingPathComponent("onnx"), includingPropertiesForKeys: nil)
        let isGraph = { (file: URL) in
            file.pathExtension == "ort" || file.pathExtension == "onnx" && file.lastPathComponent.hasPrefix("model")
        }
        guard let graph = files.first(where: isGraph) else { throw GreedyError.noGraph }
        environment = try ORTEnv(loggingLevel: .error)
        session = try ORTSession(env: environment, modelPath: graph.path, sessionOptions: ORTSessionOptions())
        names = Set(try session.inputNames())
        outputs = Set(try session.outputNames())
    }

    /// The new ids, until one of the model's ends, `newTokens` of them, or the context.
    func generate(prompt: [Int64], newTokens: Int) throws -> [Int64] {
        guard !prompt.isEmpty, prompt.allSatisfy({ 0 <= $0 && $0 < manifest.vocab_size }) else {
            throw GreedyError.badPrompt(lastId: manifest.vocab_size - 1)
        }
        guard prompt.count <= manifest.context_length else {
            throw GreedyError.longPrompt(context: manifest.context_length)
        }
        var (ids, tokens, length) = ([Int64](), prompt, 0)
        var cache = try emptyCache()
        while ids.count < newTokens && length + tokens.count <= manifest.context_length {
            let inputs = try inputs(tokens, after: length).merging(cache) { input, _ in input }
            let result = try session.run(withInputs: inputs, outputNames: outputs, runOptions: nil)
            for past in cache.keys { // what it gives is the next run's cache, without a copy
                cache[past] = try output(result, Self.present(past))
            }
            length += tokens.count
            let token = try likeliest(output(result, "logits"))
            if manifest.eos_token_ids.contains(token) { break }
            ids.append(token)
            tokens = [token]
        }
        return ids
    }

    /// Those of its inputs that the graph has: pastkey.ort is told lengths, and how many logits to give.
    private func inputs(_ tokens: [Int64], after length: Int) throws -> [String: ORTValue] {
        let end = length + tokens.count
        let row = [1, NSNumber(value: tokens.count)]
        let known = [
            "input_ids": try value(tokens, .int64, shape: row),
            "position_ids": try value((length..<end).map(Int64.init), .int64, shape: row),
            "attention_mask": try value([Int64](repeating: 1, count: end), .int64, shape: [1, NSNumber(value: end)]),
            "seqlens_k": try value([Int32(end - 1)], .int32, shape: [1]),
            "total_sequence_length": try value([Int32(end)], .int32, shape: []),
            "logits_start": try value([Int64(-1)], .int64, shape: [1]),
        ]
        return known.filter { names.contains($0.key) }
    }

    private func value<T>(_ numbers: [T], _ type: ORTTensorElementDataType, shape: [NSNumber]) throws -> ORTValue {
        let data = numbers.withUnsafeBytes { NSMutableData(bytes: $0.baseAddress, length: $0.count) }
        return try ORTValue(tensorData: data, elementType: type, shape: shape)
    }

    /// Of no token: 1 row and 0 positions.
    private func emptyCache() throws -> [String: ORTValue] {
        var shapes: [String: [Int]] = [:]
        for (i, layer) in manifest.layers.enumerated() {
            shapes["past_key_values.\(i).key"] = [1, layer.kv_heads, 0, layer.key_head_size]
            shapes["past_key_values.\(i).value"] = [1, layer.kv_heads, 0, layer.value_head_size]
        }
        for (i, state) in manifest.states.enumerated() {
            shapes["past_conv.\(i)"] = [1, 0, state.size]
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
        guard let value = result[name] else { throw GreedyError.noOutput(name) }
        return value
    }

    /// By the logits of the last position.
    private func likeliest(_ logits: ORTValue) throws -> Int64 {
        try (logits.tensorData() as Data).withUnsafeBytes { bytes in
            let last = bytes.bindMemory(to: Float.self).suffix(manifest.vocab_size)
            return Int64(last.indices.max { last[$0] < last[$1] }! - last.startIndex)
        }
    }
}
