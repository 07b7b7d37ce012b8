// A main for the fuzz target where libFuzzer is absent: -runs=N -seed=S, or files to run again.
//
// No coverage guides it; the inputs are drawn from what the scanners and the merges treat
// specially.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv);
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

std::vector<uint8_t> draw_input(std::mt19937* random, int run) {
  static const std::string kLikely =
      "aaabcst  \n\r\t'/.!1239SEREll<s>\xC2\xA0\xE3\x80\x80\xCC\x81\xC5\xBF";
  const size_t most = run % 8 == 0 ? 9000 : run % 3 == 0 ? 400 : 60;
  std::vector<uint8_t> bytes((*random)() % most);
  const bool any = (*random)() % 4 == 0, repeats = (*random)() % 5 == 0;
  for (uint8_t& b : bytes) {
    b = static_cast<uint8_t>(any ? (*random)() : kLikely[(*random)() % kLikely.size()]);
  }
  if (repeats) {
    for (size_t i = 8; i < bytes.size(); ++i) bytes[i] = bytes[4 + i % 3];
  }
  for (size_t i = 0; i < bytes.size() && i < 8; ++i) bytes[i] = static_cast<uint8_t>((*random)());
  return bytes;
}

}  // namespace

int main(int argc, char** argv) {
  LLVMFuzzerInitialize(&argc, &argv);
  int runs = 0;
  uint32_t seed = 0;
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], "-runs=", 6) == 0) {
      runs = std::atoi(argv[i] + 6);
    } else if (std::strncmp(argv[i], "-seed=", 6) == 0) {
      seed = static_cast<uint32_t>(std::atoi(argv[i] + 6));
    } else if (std::ifstream file(argv[i], std::ios::binary); file) {
      const std::string bytes((std::istreambuf_iterator<char>(file)), {});
      LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
    } else {
      std::fprintf(stderr, "cannot read %s\n", argv[i]);
      return 2;
    }
  }
  std::mt19937 random(seed);
  for (int run = 0; run < runs; ++run) {
    const std::vector<uint8_t> bytes = draw_input(&random, run);
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  std::fprintf(stderr, "Done %d runs\n", runs);
}
