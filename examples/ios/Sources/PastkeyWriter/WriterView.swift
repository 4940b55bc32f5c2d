#if canImport(SwiftUI)
import SwiftUI

/// Brings a bundle at the first use, and shows a text as it is written.
///
///     @main struct Example: App {
///         let bundle = URL(string: "https://example.com/bundle")!
///         var body: some Scene { WindowGroup { WriterView(bundle: bundle, manifestSHA256: nil) } }
///     }
public struct WriterView: View {
    @StateObject private var page: Page
    @State private var prompt = "Once upon a time"
    @State private var temperature = 0.8
    @State private var topP = 0.95

    public init(bundle: URL, manifestSHA256: String?) {
        _page = StateObject(wrappedValue: Page(bundle: bundle, manifestSHA256: manifestSHA256))
    }

    public var body: some View {
        VStack(alignment: .leading, spacing: 12) {
            TextField("Beginning of a text", text: $prompt, axis: .vertical).textFieldStyle(.roundedBorder)
            Text("Temperature \(temperature, format: .number.precision(.fractionLength(1)))")
            Slider(value: $temperature, in: 0...2, step: 0.1).accessibilityLabel("Temperature")
            Text("Top-p \(topP, format: .number.precision(.fractionLength(2)))")
            Slider(value: $topP, in: 0.01...1).accessibilityLabel("Top-p")
            Button(page.working ? "Stop" : "Write") {
                if page.working {
                    page.stop()
                } else {
                    page.write(prompt, temperature: Float(temperature), topP: Float(topP))
                }
            }
            Text(page.status).font(.footnote)
            ScrollView { Text(page.text).textSelection(.enabled).frame(maxWidth: .infinity, alignment: .leading) }
        }
        .padding()
    }
}

@MainActor
final class Page: ObservableObject {
    @Published private(set) var text = ""
    @Published private(set) var status = ""
    @Published private(set) var working = false
    private let bundle: URL
    private let manifestSHA256: String?
    private var writer: Writer?
    private var task: Task<Void, Never>?

    init(bundle: URL, manifestSHA256: String?) {
        (self.bundle, self.manifestSHA256) = (bundle, manifestSHA256)
    }

    func stop() { task?.cancel() }

    func write(_ prompt: String, temperature: Float, topP: Float) {
        (working, text, status) = (true, prompt, "")
        task = Task {
            do {
                let sampling = try Sampling(temperature: temperature, topP: topP)
                let writer = try await opened()
                status = ""
                for try await piece in writer.pieces(after: prompt, sampling, maxNewTokens: 400) { text += piece }
            } catch {
                status = error.localizedDescription
            }
            working = false
        }
    }

    private func opened() async throws -> Writer {
        if let writer { return writer }
        let support = try FileManager.default.url(
            for: .applicationSupportDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
        let folder = support.appendingPathComponent("bundle")
        if !FileManager.default.fileExists(atPath: folder.appendingPathComponent(Manifest.name).path) {
            try await download(bundle: bundle, to: folder, manifestSHA256: manifestSHA256) { [weak self] done, all in
                Task { @MainActor in self?.status = "\(done / 1_000_000) of \(all / 1_000_000) MB" }
            }
        }
        let made = try await Writer(bundle: folder)
        writer = made
        return made
    }
}
#endif
