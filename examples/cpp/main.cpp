// Score images with an exported detector: predict_onnx bottle.onnx image.ppm ...
//
// The images are PPM files (P6, 8 bits) of the size that bottle.json tells; the rows are those of predict.py.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

// Return where a value of the .json file begins.
size_t place_of(const std::string& facts, const std::string& name) {
    const size_t place = facts.find('"' + name + '"');
    if (place == std::string::npos) throw std::runtime_error("the .json file lacks " + name);
    return facts.find(':', place) + 1;
}

double number(const std::string& facts, const std::string& name) {
    return std::strtod(facts.c_str() + place_of(facts, name), nullptr);
}

std::vector<uint8_t> read_image(const std::string& path, long height, long width) {
    std::ifstream file(path, std::ios::binary);
    std::string kind;
    long w = 0, h = 0, white = 0;
    std::vector<uint8_t> pixels(height * width * 3);
    file >> kind >> w >> h >> white;
    file.get();  // one white space
    if (kind != "P6" || w != width || h != height || white != 255 || !file.read((char*)pixels.data(), pixels.size())) {
        const std::string size = std::to_string(width) + "x" + std::to_string(height);
        throw std::runtime_error(path + ": is no PPM file (P6, 8 bits) of " + size);
    }
    return pixels;
}

// Print x, y, width, height of the region of a map that holds its maximum and is above the threshold, or, where several
// networks decide, above what is near the maximum.
void print_region(const float* heat, long height, long width, double threshold) {
    std::vector<float> sorted(heat, heat + height * width);
    const size_t middle = sorted.size() / 2;
    std::sort(sorted.begin(), sorted.end());
    const float median = sorted.size() % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
    const double highest = sorted.back(), level = std::min(threshold, highest - (highest - median) / 4);
    std::vector<bool> inside(sorted.size());
    std::vector<long> waiting{std::max_element(heat, heat + height * width) - heat};
    long left = width, top = height, right = 0, bottom = 0;
    while (!waiting.empty()) {
        const long at = waiting.back(), y = at / width, x = at % width;
        waiting.pop_back();
        if (inside[at] || heat[at] <= level) continue;
        inside[at] = true;
        left = std::min(left, x), right = std::max(right, x + 1);
        top = std::min(top, y), bottom = std::max(bottom, y + 1);
        if (y > 0) waiting.push_back(at - width);
        if (y < height - 1) waiting.push_back(at + width);
        if (x > 0) waiting.push_back(at - 1);
        if (x < width - 1) waiting.push_back(at + 1);
    }
    std::printf("%ld,%ld,%ld,%ld\n", left, top, right - left, bottom - top);
}

int main(int argc, char** argv) try {
    const std::string model = argc > 1 ? argv[1] : "";
    std::ifstream file(model.substr(0, model.rfind('.')) + ".json");
    const std::string facts{std::istreambuf_iterator<char>(file), {}};
    const double rate = number(facts, "rate"), threshold = number(facts, "threshold");
    const char* scores = facts.c_str() + place_of(facts, "calibration_scores");
    const double total = 2 + std::count(scores, std::find(scores, facts.c_str() + facts.size(), ']'), ',');

    Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "predict_onnx");
    Ort::Session session(env, model.c_str(), Ort::SessionOptions{});
    std::vector<int64_t> shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
    shape[0] = 1;  // a batch of one: (1, H, W, 3)
    const char *inputs[] = {"images"}, *outputs[] = {"scores", "p_values", "maps"};  // of those that there are
    const bool has_maps = facts.compare(place_of(facts, "has_maps"), 5, " true") == 0;
    auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);

    std::printf("path,score,p_value,anomalous,x,y,width,height\n");
    for (int i = 2; i < argc; ++i) {
        std::vector<uint8_t> pixels = read_image(argv[i], shape[1], shape[2]);
        Ort::Value images =
            Ort::Value::CreateTensor<uint8_t>(memory, pixels.data(), pixels.size(), shape.data(), shape.size());
        const auto answers = session.Run(Ort::RunOptions{nullptr}, inputs, &images, 1, outputs, 2 + has_maps);
        const float score = *answers[0].GetTensorData<float>(), p = *answers[1].GetTensorData<float>();
        const bool anomalous = p <= rate;
        std::printf("%s,%.9g,%.17g,%d,", argv[i], score, std::round(p * total) / total, anomalous);
        if (anomalous && has_maps)
            print_region(answers[2].GetTensorData<float>(), shape[1], shape[2], threshold);
        else
            std::printf(",,,\n");
    }
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "predict_onnx: error: %s\n", error.what());
    return 1;
}
