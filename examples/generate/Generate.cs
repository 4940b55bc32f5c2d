/*
 * A whole generation by one call of onnxruntime: token ids in, token ids out. Text is the application's.
 *
 *     pastkey export checkpoint --out bundle --generate
 *     dotnet new console --name Generate && cp Generate.cs Generate/Program.cs && cd Generate
 *     dotnet add package Microsoft.ML.OnnxRuntime --version 1.27.0
 *     dotnet run -- ../bundle/onnx/generate.onnx 64 0.8 0 1 0 1 7 "0" 1 2 3
 *
 * The arguments: the graph, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, end ids in one
 * word with spaces between them, and the prompt's ids.
 */
using System;
using System.Collections.Generic;
using System.Globalization;
using System.Linq;
using Microsoft.ML.OnnxRuntime;

static class Program
{
    /// <summary>The new ids behind those of `prompt`. `settings` has all others of the graph's inputs.</summary>
    static long[] Generate(InferenceSession session, long[] prompt, Dictionary<string, OrtValue> settings)
    {
        using (var row = OrtValue.CreateTensorValueFromMemory(prompt, new long[] { 1, prompt.Length }))
        using (var options = new RunOptions())
        {
            var inputs = new Dictionary<string, OrtValue>(settings) { ["input_ids"] = row };
            using (var outputs = session.Run(options, inputs, new[] { "ids" }))
                return outputs[0].GetTensorDataAsSpan<long>().ToArray();
        }
    }

    static OrtValue Integers(params long[] numbers) =>
        OrtValue.CreateTensorValueFromMemory(numbers, new long[] { numbers.Length });

    static OrtValue Number(string number) => OrtValue.CreateTensorValueFromMemory(
        new[] { float.Parse(number, CultureInfo.InvariantCulture) }, new long[] { 1 });

    static long[] Longs(IEnumerable<string> words) => words.Where(word => word != "").Select(long.Parse).ToArray();

    static void Main(string[] words)
    {
        var settings = new Dictionary<string, OrtValue>
        {
            ["max_new_tokens"] = Integers(long.Parse(words[1])),
            ["temperature"] = Number(words[2]),
            ["top_k"] = Integers(long.Parse(words[3])),
            ["top_p"] = Number(words[4]),
            ["min_p"] = Number(words[5]),
            ["repetition_penalty"] = Number(words[6]),
            ["seed"] = Integers(long.Parse(words[7])),
            ["end_ids"] = Integers(Longs(words[8].Split(' '))),
        };
        using (var session = new InferenceSession(words[0]))
            Console.WriteLine(string.Join(" ", Generate(session, Longs(words.Skip(9)), settings)));
        foreach (var setting in settings.Values) setting.Dispose();
    }
}
