// What examples/ios calls of CryptoKit, by coreutils.
import Foundation

public struct SHA256 {
    private var content = Data()

    public init() {}

    public mutating func update(data: Data) { content += data }

    public func finalize() -> [UInt8] {
        let (process, input, output) = (Process(), Pipe(), Pipe())
        process.executableURL = URL(fileURLWithPath: "/usr/bin/sha256sum")
        (process.standardInput, process.standardOutput) = (input, output)
        try! process.run()
        input.fileHandleForWriting.write(content)
        try! input.fileHandleForWriting.close()
        let digits = Array(String(decoding: output.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self).prefix(64))
        return stride(from: 0, to: 64, by: 2).map { UInt8(String(digits[$0...$0 + 1]), radix: 16)! }
    }
}
