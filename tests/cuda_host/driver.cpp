// One source of csrc/cuda (CAPS_SOURCE), compiled for the host, and what tests set and read of the harness.
#include CAPS_SOURCE

extern "C" __attribute__((visibility("default"))) int* cuda_host_setting(const char* name) {
  auto& s = cuda_host::settings;
  const std::map<std::string, int*> settings = {
      {"order", &s.order},
      {"seed", &s.seed},
      {"processors", &s.processors},
      {"blocks_a_processor", &s.blocks_a_processor},
      {"shared_limit", &s.shared_limit},
      {"cooperative", &s.cooperative},
      {"refuse", &s.refuse},
      {"launches", &s.launches},
  };
  const auto found = settings.find(name);
  return found == settings.end() ? nullptr : found->second;
}
