/*
 * A whole generation by one call of onnxruntime: token ids in, token ids out. Text is the application's.
 *
 * The package, in a build.gradle (on Android onnxruntime-android):
 *
 *     dependencies { implementation 'com.microsoft.onnxruntime:onnxruntime:1.27.0' }
 *
 * The bundle, by `pastkey export checkpoint --out bundle --generate`. Then, with the jar of the package:
 *
 *     java -cp onnxruntime-1.27.0.jar Generate.java bundle/onnx/generate.onnx 64 0.8 0 1 0 1 7 "0" 1 2 3
 *
 * The arguments: the graph, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, end ids in one
 * word with spaces between them, and the prompt's ids.
 */
import ai.onnxruntime.OnnxTensor;
import ai.onnxruntime.OrtEnvironment;
import ai.onnxruntime.OrtException;
import ai.onnxruntime.OrtSession;
import java.nio.FloatBuffer;
import java.nio.LongBuffer;
import java.util.Arrays;
import java.util.HashMap;
import java.util.Map;

public final class Generate {
    private static final OrtEnvironment ENVIRONMENT = OrtEnvironment.getEnvironment();

    /** The new ids behind those of `prompt`. `settings` has all others of the graph's inputs. */
    static long[] generate(OrtSession session, long[] prompt, Map<String, OnnxTensor> settings) throws OrtException {
        try (OnnxTensor row = OnnxTensor.createTensor(ENVIRONMENT, new long[][] {prompt})) {
            Map<String, OnnxTensor> inputs = new HashMap<>(settings);
            inputs.put("input_ids", row);
            try (OrtSession.Result result = session.run(inputs)) {
                LongBuffer ids = ((OnnxTensor) result.get("ids").get()).getLongBuffer();
                long[] made = new long[ids.remaining()];
                ids.get(made);
                return made;
            }
        }
    }

    static OnnxTensor integers(long... numbers) throws OrtException {
        return OnnxTensor.createTensor(ENVIRONMENT, LongBuffer.wrap(numbers), new long[] {numbers.length});
    }

    static OnnxTensor number(String number) throws OrtException {
        return OnnxTensor.createTensor(
                ENVIRONMENT, FloatBuffer.wrap(new float[] {Float.parseFloat(number)}), new long[] {1});
    }

    private static long[] longs(String... words) {
        return Arrays.stream(words).filter(word -> !word.isEmpty()).mapToLong(Long::parseLong).toArray();
    }

    public static void main(String[] words) throws OrtException {
        Map<String, OnnxTensor> settings = new HashMap<>();
        settings.put("max_new_tokens", integers(longs(words[1])));
        settings.put("temperature", number(words[2]));
        settings.put("top_k", integers(longs(words[3])));
        settings.put("top_p", number(words[4]));
        settings.put("min_p", number(words[5]));
        settings.put("repetition_penalty", number(words[6]));
        settings.put("seed", integers(longs(words[7])));
        settings.put("end_ids", integers(longs(words[8].split(" "))));
        long[] prompt = longs(Arrays.copyOfRange(words, 9, words.length));
        try (OrtSession session = ENVIRONMENT.createSession(words[0], new OrtSession.SessionOptions())) {
            for (long id : generate(session, prompt, settings)) System.out.print(id + " ");
            System.out.println();
        }
    }
}
