#include "id_buffer.h"

#include <atomic>
#include <cstdlib>
#include <new>
#include <utility>

namespace lmfast::bpe {
namespace {

// Buffers between 64 KB and 32 MB wait here for the next call; at most four of them.
constexpr size_t kLeast = 1u << 14, kMost = 8u << 20, kPooled = 4;

struct Header {
  size_t capacity;
  size_t unused[7];  // keeps the ids on a cache line of their own
};
std::atomic<Header*> g_pool[kPooled];

Header* header_of(uint32_t* data) {
  return reinterpret_cast<Header*>(reinterpret_cast<char*>(data) - sizeof(Header));
}
uint32_t* data_of(Header* header) { return reinterpret_cast<uint32_t*>(header + 1); }

}  // namespace

IdBuffer::IdBuffer(IdBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      capacity_(std::exchange(other.capacity_, 0)) {}

IdBuffer::~IdBuffer() {
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

void IdBuffer::grow(size_t count) {
  if (data_ == nullptr && count > 256) {
    for (auto& slot : g_pool) {
      Header* header = slot.exchange(nullptr);
      if (header == nullptr) continue;
      data_ = data_of(header);
      capacity_ = header->capacity;
      break;
    }
    if (capacity_ - size_ >= count) return;
  }
  size_t wanted = capacity_ + capacity_ / 2;
  if (wanted < size_ + count) wanted = size_ + count;
  void* memory = std::realloc(data_ == nullptr ? nullptr : header_of(data_),
                              sizeof(Header) + wanted * sizeof(uint32_t));
  if (memory == nullptr) throw std::bad_alloc();
  data_ = data_of(static_cast<Header*>(memory));
  capacity_ = wanted;
}

void IdBuffer::trim() {
  if (data_ == nullptr || capacity_ <= 2 * size_ + kLeast) return;
  void* memory = std::realloc(header_of(data_), sizeof(Header) + size_ * sizeof(uint32_t));
  if (memory == nullptr) return;
  data_ = data_of(static_cast<Header*>(memory));
  capacity_ = size_;
}

}  // namespace lmfast::bpe
