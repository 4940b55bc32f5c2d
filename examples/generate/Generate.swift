// A whole generation by one call of onnxruntime: token ids in, token ids out. Text is the application's.
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
// Of a bundle by `pastkey export checkpoint --out bundle --generate`, as a folder reference in the application:
// onnx/generate.onnx and onnx/*.onnx_data.
//
//     let folder = Bundle.main.url(forResource: "bundle", withExtension: nil)!
//     let generator = try Generator(graph: folder.appendingPathComponent("onnx/generate.onnx"))
//     let ids = try generator.generate(prompt: [1, 2, 3], Settings(temperature: 0.8, seed: 7))

import Foundation
#if canImport(OnnxRuntimeBindings)
import OnnxRuntimeBindings
#else
import onnxruntime_objc
#endif

/// As they are here, they change nothing.
struct Settings {
    var maxNewTokens: Int64 = 64
    var endIds: [Int64] = []
    var temperature: Float = 0
    var topK: Int64 = 0
    var topP: Float = 1
    var minP: Float = 0
    var repetitionPenalty: Float = 1
    var seed: Int64 = 0
}

final class Generator {
    private let environment: ORTEnv
    private let session: ORTSession

    init(graph: URL) throws {
        environment = try ORTEnv(loggingLevel: .error)
        session = try ORTSession(env: environment, modelPath: graph.path, sessionOptions: ORTSessionOptions())
    }

    /// The new ids behind those of `prompt`.
    func generate(prompt: [Int64], _ settings: Settings = Settings()) throws -> [Int64] {
        let inputs = [
            "input_ids": try value(prompt, .int64, shape: [1, NSNumber(value: prompt.count)]),
            "max_new_tokens": try value([settings.maxNewTokens], .int64, shape: [1]),
            "end_ids": try value(settings.endIds, .int64, shape: [NSNumber(value: settings.endIds.count)]),
            "temperature": try value([settings.temperature], .float, shape: [1]),
            "top_k": try value([settings.topK], .int64, shape: [1]),
            "top_p": try value([settings.topP], .float, shape: [1]),
            "min_p": try value([settings.minP], .float, shape: [1]),
            "repetition_penalty": try value([settings.repetitionPenalty], .float, shape: [1]),
            "seed": try value([settings.seed], .int64, shape: [1]),
        ]
        let ids = try session.run(withInputs: inputs, outputNames: ["ids"], runOptions: nil)["ids"]!
        return try (ids.tensorData() as Data).withUnsafeBytes { Array($0.bindMemory(to: Int64.self)) }
    }

    private func value<T>(_ numbers: [T], _ type: ORTTensorElementDataType, shape: [NSNumber]) throws -> ORTValue {
        let data = numbers.isEmpty
            ? NSMutableData(length: MemoryLayout<T>.size)! // memory of no bytes may have no address
            : numbers.withUnsafeBytes { NSMutableData(bytes: $0.baseAddress!, length: $0.count) }
        return try ORTValue(tensorData: data, elementType: type, shape: shape)
    }
}
