import Foundation

/// What is read of a bundle's pastkey.json, by its own names.
struct Manifest: Decodable {
    struct Layer: Decodable { let kv_heads, key_head_size, value_head_size: Int }
    struct Rows: Decodable { let rows, size: Int }
    struct Record: Decodable {
        let size: Int
        let sha256: String
    }
    let vocab_size, context_length: Int
    let layers: [Layer]
    let rows: [Rows]
    let eos_token_ids: [Int]
    let precision: String
    let files: [String: Record]

    static let name = "pastkey.json"
    static let tokenizer = ["tokenizer.json", "tokenizer_config.json"]

    init(_ content: Data) throws {
        self = try JSONDecoder().decode(Manifest.self, from: content)
        guard Self.tokenizer.allSatisfy({ files[$0] != nil }) else { throw WriterError.noTokenizer }
        guard precision != "fp16" else { throw WriterError.halfPrecision }
    }

    /// One file with its weights, or the graph for every program, with onnx/….onnx_data next to it.
    func graph() throws -> String {
        let found = files["onnx/pastkey.ort"] != nil ? "onnx/pastkey.ort" : paths(#"^onnx/model\w*\.onnx$"#).first
        guard let found else { throw WriterError.noGraph }
        return found
    }

    private func paths(_ pattern: String) -> [String] {
        files.keys.filter { $0.range(of: pattern, options: .regularExpression) != nil }.sorted()
    }

    /// The files that the application loads.
    func needed() throws -> [String] {
        let graph = try graph()
        let weights = graph.hasSuffix(".onnx") ? paths(#"^onnx/[\w.-]+\.onnx_data(_\d+)?$"#) : []
        return Self.tokenizer + [graph] + weights
    }
}

public enum WriterError: Error, LocalizedError, Equatable {
    case noGraph, noTokenizer, halfPrecision
    case badAnswer(String, Int), altered(String), anotherManifest
    case badSetting(String), longPrompt(Int, context: Int), noOutput(String)

    public var errorDescription: String? {
        switch self {
        case .noGraph: "the bundle has no onnx/model….onnx: export it without --graph static"
        case .noTokenizer: "the bundle has no tokenizer.json and tokenizer_config.json"
        case .halfPrecision: "the caches here are float32: export in int8, int4 or fp32"
        case let .badAnswer(url, status): "\(url) answers \(status)"
        case let .altered(path): "\(path) has another SHA-256 than \(Manifest.name) says: it was altered"
        case .anotherManifest: "\(Manifest.name) has another SHA-256 than the one that the application was made with"
        case let .badSetting(name): "\(name) is out of range"
        case let .longPrompt(tokens, context): "the prompt has \(tokens) tokens, the context \(context)"
        case let .noOutput(name): "the graph has no output \(name)"
        }
    }
}
