plugins {
    id("com.android.application")
    id("org.jetbrains.kotlin.android")
}

android {
    namespace = "com.example.pastkey"
    compileSdk = 35
    defaultConfig {
        applicationId = "com.example.pastkey"
        minSdk = 26 // of the tokenizer
        targetSdk = 35
        versionCode = 1
        versionName = "1.0"
        ndk { abiFilters += listOf("arm64-v8a", "x86_64") } // phones, and the emulator of a PC
        buildConfigField("String", "BUNDLE_URL", "\"${property("pastkey.url")}\"")
        buildConfigField("String", "MANIFEST_SHA256", "\"${property("pastkey.sha256")}\"")
        externalNativeBuild { cmake { arguments += "-DANDROID_STL=c++_shared" } }
    }
    buildFeatures { buildConfig = true }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
    kotlinOptions { jvmTarget = "17" }
    // Nothing is compiled: the build packs libc++_shared.so, which the tokenizer's library needs and does not bring.
    externalNativeBuild { cmake { path = file("src/main/cpp/CMakeLists.txt") } }
}

dependencies {
    implementation("com.microsoft.onnxruntime:onnxruntime-android:1.27.0")
    implementation("ai.djl.huggingface:tokenizers:0.33.0") // the Rust library that Python's tokenizers is
    runtimeOnly("ai.djl.android:tokenizer-native:0.33.0") // its build for Android, of the same release
}
