// What examples/ios calls of swift-transformers, for a vocabulary of characters: the package itself is fetched from a
// place that tests do not ask.
import Foundation

public protocol Tokenizer: Sendable {
    func encode(text: String, addSpecialTokens: Bool) -> [Int]
    func decode(tokens: [Int], skipSpecialTokens: Bool) -> String
}

public enum AutoTokenizer {
    public static func from(modelFolder: URL) async throws -> any Tokenizer {
        let content = try Data(contentsOf: modelFolder.appendingPathComponent("tokenizer.json"))
        let parsed = try JSONSerialization.jsonObject(with: content) as! [String: Any]
        return Characters((parsed["model"] as! [String: Any])["vocab"] as! [String: Int])
    }
}

private struct Characters: Tokenizer {
    let ids: [String: Int]
    let words: [Int: String]

    init(_ ids: [String: Int]) {
        self.ids = ids
        words = Dictionary(uniqueKeysWithValues: ids.map { ($1, $0) })
    }

    func encode(text: String, addSpecialTokens: Bool) -> [Int] { text.map { ids[String($0)]! } }

    func decode(tokens: [Int], skipSpecialTokens: Bool) -> String { tokens.map { words[$0] ?? "" }.joined() }
}
