// How an op went.
#pragma once

#include <string>

namespace fused_dni::cuda {

struct Status {
  int code = 0;           // a cudaError_t; 0: no error
  const char* name = "";  // the error's, cudaErrorNoDevice for instance
  std::string text;       // what went wrong, as the end of a sentence that begins with the kernel
  bool lost = false;      // the context, and not this launch alone
  bool ok() const { return code == 0; }
};

// In launch.cu.
std::string version(int number);  // 13000: "13.0"
void use_device(int device, Status& status);
// On the current device, any kernel.
int resident_blocks_of(const void* kernel, int threads, int shared, Status& status);
int resident_clusters_of(const void* kernel, int threads, int shared, int cluster);
// Lets later launches have no more blocks than so (0: all that fit), and clusters or not.
void limit_residents(int blocks, bool clusters);
void refuse_clusters_of(const void* kernel, int threads, int shared, int cluster);
void launch_cooperative(const void* kernel, void** arguments, int blocks, int threads, int shared,
                        void* stream, Status& status, int cluster);

}  // namespace fused_dni::cuda
