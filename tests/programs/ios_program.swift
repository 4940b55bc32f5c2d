// examples/ios on a PC, without its view: a line of JSON comes in for each call, and one goes out.
// ARGUMENTS: the address of a bundle's folder, an empty folder, the SHA-256 of pastkey.json or "".
import Foundation

struct Call: Decodable {
    let prompt: String
    let temperature, top_p, min_p, repetition_penalty: Float
    let top_k, max_new_tokens: Int
    let seed: UInt64
    let stop_after: Int?
    let logits: [Float]? // with ids: only a token is drawn
    let ids: [Int]?
}

struct Answer: Encodable {
    var token: Int?
    var pieces: [String]?
    var ending: String?
    var error: String?
}

@main struct Program {
    static func main() async {
        let words = CommandLine.arguments
        do {
            let folder = URL(fileURLWithPath: words[2])
            let pinned = words[3].isEmpty ? nil : words[3]
            try await download(bundle: URL(string: words[1])!, to: folder, manifestSHA256: pinned)
            let writer = try await Writer(bundle: folder)
            while let line = readLine() {
                say(await answer(writer, try JSONDecoder().decode(Call.self, from: Data(line.utf8))))
            }
        } catch {
            say(Answer(error: error.localizedDescription))
        }
    }

    static func say(_ answer: Answer) {
        print(String(decoding: try! JSONEncoder().encode(answer), as: UTF8.self))
    }

    static func answer(_ writer: Writer, _ call: Call) async -> Answer {
        do {
            let sampling = try Sampling(
                temperature: call.temperature, topK: call.top_k, topP: call.top_p, minP: call.min_p,
                repetitionPenalty: call.repetition_penalty, seed: call.seed)
            if let logits = call.logits, let ids = call.ids {
                return Answer(token: sampling.next(logits, after: ids))
            }
            var pieces: [String] = []
            if let stopAfter = call.stop_after { // as the view does: by its stream, which is left
                for try await piece in writer.pieces(after: call.prompt, sampling, maxNewTokens: call.max_new_tokens) {
                    pieces.append(piece)
                    if pieces.count == stopAfter { break }
                }
                return Answer(pieces: pieces, ending: "stopped")
            }
            let collected = Collected()
            let ending = try await writer.write(call.prompt, sampling, maxNewTokens: call.max_new_tokens) {
                collected.pieces.append($0)
            }
            return Answer(pieces: collected.pieces, ending: ending.rawValue)
        } catch {
            return Answer(error: error.localizedDescription)
        }
    }
}

final class Collected: @unchecked Sendable { var pieces: [String] = [] }
