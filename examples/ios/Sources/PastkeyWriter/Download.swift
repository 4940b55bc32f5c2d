import Foundation
#if canImport(FoundationNetworking)
import FoundationNetworking
#endif
#if canImport(CryptoKit)
import CryptoKit
#else
import Crypto
#endif

/// Brings a bundle from `url` into `folder`: pastkey.json, and the files it names that the application loads.
///
/// Every file is checked against its hash in pastkey.json, which comes last: a folder that has it is whole. A second
/// call keeps the files that are right already. With `manifestSHA256` the manifest is checked too, so that nothing else
/// can be loaded than what the application was made with. Cancelling the task ends the download.
///
/// `progress` gets the bytes so far and all bytes, after each file and, on Apple's systems, during it.
public func download(
    bundle url: URL, to folder: URL, manifestSHA256: String? = nil,
    progress: @escaping @Sendable (Int, Int) -> Void = { _, _ in }
) async throws {
    let manifestFile = try await fetched(url.appendingPathComponent(Manifest.name)) { _ in }
    guard try manifestSHA256 == nil || sha256(manifestFile) == manifestSHA256 else { throw WriterError.anotherManifest }
    let content = try Data(contentsOf: manifestFile)
    let manifest = try Manifest(content)
    let missing = try manifest.needed().filter { path in
        (try? sha256(folder.appendingPathComponent(path))) != manifest.files[path]!.sha256
    }
    let all = missing.reduce(0) { $0 + manifest.files[$1]!.size }
    var before = 0
    for path in missing {
        let record = manifest.files[path]!
        let sofar = before
        let part = try await fetched(url.appendingPathComponent(path)) { share in
            progress(sofar + Int(share * Double(record.size)), all)
        }
        guard try sha256(part) == record.sha256 else {
            try? FileManager.default.removeItem(at: part)
            throw WriterError.altered(path)
        }
        try put(part, folder.appendingPathComponent(path))
        before += record.size
        progress(before, all)
    }
    try content.write(to: folder.appendingPathComponent(Manifest.name), options: .atomic)
}

/// A temporary file with what `url` answers. `progress` gets the share that is there.
private func fetched(_ url: URL, progress: @escaping @Sendable (Double) -> Void) async throws -> URL {
    let (file, response) = try await URLSession.shared.download(from: url, delegate: Watch(progress))
    if let status = (response as? HTTPURLResponse)?.statusCode, status != 200 {
        throw WriterError.badAnswer(url.absoluteString, status)
    }
    return file
}

private final class Watch: NSObject, URLSessionTaskDelegate, @unchecked Sendable {
    private let progress: @Sendable (Double) -> Void

    init(_ progress: @escaping @Sendable (Double) -> Void) { self.progress = progress }

    #if canImport(ObjectiveC)
    private var observation: NSKeyValueObservation?

    func urlSession(_ session: URLSession, didCreateTask task: URLSessionTask) {
        observation = task.progress.observe(\.fractionCompleted) { [progress] now, _ in progress(now.fractionCompleted) }
    }
    #endif
}

private func put(_ part: URL, _ file: URL) throws {
    try FileManager.default.createDirectory(
        at: file.deletingLastPathComponent(), withIntermediateDirectories: true)
    try? FileManager.default.removeItem(at: file)
    try FileManager.default.moveItem(at: part, to: file)
}

func sha256(_ file: URL) throws -> String {
    let handle = try FileHandle(forReadingFrom: file)
    defer { try? handle.close() }
    var hash = SHA256()
    while let part = try handle.read(upToCount: 1 << 20), !part.isEmpty { hash.update(data: part) }
    return hash.finalize().map { String(format: "%02x", $0) }.joined()
}
