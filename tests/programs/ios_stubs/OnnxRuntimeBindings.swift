// What examples/ios calls of onnxruntime's package for Swift, over the library of Python's package: Objective-C, which
// the package is written in, is Apple's alone.
import COnnxRuntime
import Foundation

private let api = OrtGetApiBase().pointee.GetApi(UInt32(ORT_API_VERSION))!.pointee

private struct Failed: Error { let message: String }

private func check(_ status: OpaquePointer?) throws {
    guard let status else { return }
    defer { api.ReleaseStatus(status) }
    throw Failed(message: String(cString: api.GetErrorMessage(status)!))
}

public enum ORTLoggingLevel { case error }

public enum ORTTensorElementDataType { case float, int32, int64 }

public final class ORTEnv {
    let raw: OpaquePointer

    public init(loggingLevel: ORTLoggingLevel) throws {
        var made: OpaquePointer?
        try check(api.CreateEnv(ORT_LOGGING_LEVEL_ERROR, "swift", &made))
        raw = made!
    }
}

public final class ORTSessionOptions {
    let raw: OpaquePointer

    public init() throws {
        var made: OpaquePointer?
        try check(api.CreateSessionOptions(&made))
        raw = made!
    }
}

public final class ORTRunOptions {}

public final class ORTValue {
    let raw: OpaquePointer
    private let memory: NSMutableData?

    init(raw: OpaquePointer) { (self.raw, memory) = (raw, nil) }

    public init(tensorData: NSMutableData, elementType: ORTTensorElementDataType, shape: [NSNumber]) throws {
        var about: OpaquePointer?
        try check(api.CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &about))
        defer { api.ReleaseMemoryInfo(about) }
        let (type, size) = switch elementType {
        case .float: (ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4)
        case .int32: (ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, 4)
        case .int64: (ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 8)
        }
        let sizes = shape.map(\.int64Value)
        let bytes = sizes.reduce(size) { $0 * Int($1) }
        var made: OpaquePointer?
        try check(
            api.CreateTensorWithDataAsOrtValue(
                about, tensorData.mutableBytes, bytes, sizes, sizes.count, type, &made))
        (raw, memory) = (made!, tensorData)
    }

    deinit { api.ReleaseValue(raw) }

    public func tensorData() throws -> NSMutableData {
        var (about, count, bytes): (OpaquePointer?, Int, UnsafeMutableRawPointer?) = (nil, 0, nil)
        try check(api.GetTensorTypeAndShape(raw, &about))
        defer { api.ReleaseTensorTypeAndShapeInfo(about) }
        try check(api.GetTensorShapeElementCount(about, &count))
        try check(api.GetTensorMutableData(raw, &bytes))
        return NSMutableData(bytes: bytes!, length: 4 * count) // logits alone are asked for
    }
}

public final class ORTSession {
    private let raw: OpaquePointer

    public init(env: ORTEnv, modelPath: String, sessionOptions: ORTSessionOptions?) throws {
        var made: OpaquePointer?
        try check(api.CreateSession(env.raw, modelPath, sessionOptions?.raw, &made))
        raw = made!
    }

    deinit { api.ReleaseSession(raw) }

    public func inputNames() throws -> [String] { try names(api.SessionGetInputCount, api.SessionGetInputName) }

    public func outputNames() throws -> [String] { try names(api.SessionGetOutputCount, api.SessionGetOutputName) }

    private func names(
        _ counted: (OpaquePointer?, UnsafeMutablePointer<Int>?) -> OpaquePointer?,
        _ named: (OpaquePointer?, Int, UnsafeMutablePointer<OrtAllocator>?, UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>?)
            -> OpaquePointer?
    ) throws -> [String] {
        var (count, allocator): (Int, UnsafeMutablePointer<OrtAllocator>?) = (0, nil)
        try check(api.GetAllocatorWithDefaultOptions(&allocator))
        try check(counted(raw, &count))
        return try (0..<count).map { place in
            var name: UnsafeMutablePointer<CChar>?
            try check(named(raw, place, allocator, &name))
            return String(cString: name!)
        }
    }

    public func run(
        withInputs inputs: [String: ORTValue], outputNames: Set<String>, runOptions: ORTRunOptions?
    ) throws -> [String: ORTValue] {
        let (given, wanted) = (Array(inputs.keys), Array(outputNames))
        let (givenNames, wantedNames) = (given.map { strdup($0) }, wanted.map { strdup($0) })
        defer { (givenNames + wantedNames).forEach { free($0) } }
        let values = given.map { Optional(inputs[$0]!.raw) }
        var made = [OpaquePointer?](repeating: nil, count: wanted.count)
        try check(
            api.Run(
                raw, nil, givenNames.map { UnsafePointer($0) }, values, given.count,
                wantedNames.map { UnsafePointer($0) }, wanted.count, &made))
        return Dictionary(uniqueKeysWithValues: zip(wanted, made.map { ORTValue(raw: $0!) }))
    }
}
