package com.example.pastkey;

public final class BuildConfig {
    public static final String BUNDLE_URL = "";
    public static final String MANIFEST_SHA256 = "";
}
