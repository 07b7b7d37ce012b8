#include "buffer.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace lmfast::bpe {
namespace {

// Buffers between 64 KB and 64 MB wait here for the next call; at most two of them. Handed over by
// atomic exchange: there is no lock that a fork could leave held.
constexpr size_t kLeast = 1u << 16, kMost = 64u << 20, kPooled = 2;

struct Header {
  size_t capacity;
  size_t unused[7];  // keeps the contents on cache lines of their own
};
std::atomic<Header*> g_pool[kPooled];

Header* header_of(char* data) { return reinterpret_cast<Header*>(data - sizeof(Header)); }
char* data_of(Header* header) { return reinterpret_cast<char*>(header + 1); }

}  // namespace

RawBuffer::~RawBuffer() {
  if (data_ == nullptr) return;
  Header* header = header_of(data_);
  header->capacity = capacity_;
  if (capacity_ >= kLeast && capacity_ <= kMost) {
    for (auto& slot : g_pool) {
      Header* empty = nullptr;
      if (slot.compare_exchange_strong(empty, header)) return;
    }
  }
  std::free(header);
}

void RawBuffer::grow(size_t more) {
  if (data_ == nullptr && more > 4096) {
    for (auto& slot : g_pool) {
      Header* header = slot.exchange(nullptr);
      if (header == nullptr) continue;
      data_ = data_of(header);
      capacity_ = header->capacity;
      break;
    }
    if (capacity_ - size_ >= more) return;
  }
  size_t wanted = capacity_ + capacity_ / 2;
  if (wanted < size_ + more) wanted = size_ + more;
  void* memory =
      std::realloc(data_ == nullptr ? nullptr : header_of(data_), sizeof(Header) + wanted);
  if (memory == nullptr) throw std::bad_alloc();
  data_ = data_of(static_cast<Header*>(memory));
  capacity_ = wanted;
}

void RawBuffer::shrink() {
  if (data_ == nullptr || capacity_ <= 2 * size_ + kLeast) return;
  void* memory = std::realloc(header_of(data_), sizeof(Header) + size_);
  if (memory == nullptr) return;
  data_ = data_of(static_cast<Header*>(memory));
  capacity_ = size_;
}

}  // namespace lmfast::bpe
