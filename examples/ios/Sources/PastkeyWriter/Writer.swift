import Foundation
import Tokenizers

/// Text in, text out: a bundle's tokenizer.json around its decoder. One text at a time.
public actor Writer {
    public enum Ending: String, Sendable { case endOfText, length, stopped }

    private let manifest: Manifest
    private let decoder: GraphDecoder
    private let tokenizer: any Tokenizer
    private static let chunk = 64

    /// Loads a folder that `download` wrote, or that is part of the application.
    public init(bundle: URL) async throws {
        manifest = try Manifest(Data(contentsOf: bundle.appendingPathComponent(Manifest.name)))
        decoder = try GraphDecoder(bundle: bundle, manifest: manifest)
        tokenizer = try await AutoTokenizer.from(modelFolder: bundle)
    }

    /// The new pieces of a text, in whole characters. The stream ends with the text; whoever stops reading ends it too.
    public nonisolated func pieces(
        after prompt: String, _ sampling: Sampling, maxNewTokens: Int
    ) -> AsyncThrowingStream<String, any Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    _ = try await write(prompt, sampling, maxNewTokens: maxNewTokens) { continuation.yield($0) }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    /// Goes on from `prompt`, until the model ends the text, `maxNewTokens` or the end of the context.
    ///
    /// `onText` gets each new piece. Cancelling the task ends the text before the next run of the graph, which has at
    /// most 64 tokens.
    @discardableResult
    public func write(
        _ prompt: String, _ sampling: Sampling, maxNewTokens: Int, onText: @Sendable (String) -> Void
    ) throws -> Ending {
        var ids = tokenizer.encode(text: prompt, addSpecialTokens: true)
        let start = ids.count
        guard (1...manifest.context_length).contains(start) else {
            throw WriterError.longPrompt(start, context: manifest.context_length)
        }
        try decoder.reset()
        var written = textOf(ids)
        while true {
            var logits: [Float] = []
            while decoder.length < ids.count {
                if Task.isCancelled { return .stopped }
                logits = try decoder.feed(Array(ids[decoder.length...].prefix(Self.chunk)))
            }
            let token = sampling.next(logits, after: ids)
            if manifest.eos_token_ids.contains(token) { return .endOfText }
            if ids.count - start == maxNewTokens { return .length }
            ids.append(token)
            let text = textOf(ids)
            if !text.hasSuffix("\u{FFFD}"), text.utf8.count > written.utf8.count { // or a character has not come whole
                onText(String(decoding: text.utf8.dropFirst(written.utf8.count), as: UTF8.self))
                written = text
            }
            if ids.count > manifest.context_length { return .length }
        }
    }

    /// Of all ids: a token's text may depend on those before it.
    private func textOf(_ ids: [Int]) -> String { tokenizer.decode(tokens: ids, skipSpecialTokens: true) }
}
