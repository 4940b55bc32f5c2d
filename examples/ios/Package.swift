// swift-tools-version: 5.9
import PackageDescription

let package = Package(
    name: "PastkeyWriter",
    platforms: [.iOS(.v16), .macOS(.v14)],
    products: [.library(name: "PastkeyWriter", targets: ["PastkeyWriter"])],
    dependencies: [
        .package(url: "https://github.com/microsoft/onnxruntime-swift-package-manager", exact: "1.24.2"),
        .package(url: "https://github.com/huggingface/swift-transformers", exact: "1.3.3"),
    ],
    targets: [
        .target(
            name: "PastkeyWriter",
            dependencies: [
                .product(name: "onnxruntime", package: "onnxruntime-swift-package-manager"),
                .product(name: "Tokenizers", package: "swift-transformers"),
            ])
    ]
)
