// A growing array whose memory is reused between calls and never cleared.
//
// A fresh 14 MB buffer for every call costs more in page faults than the encoding itself: 423 MB/s
// instead of 540.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

namespace lmfast::bpe {

class RawBuffer {
 public:
  RawBuffer() = default;
  ~RawBuffer();
  RawBuffer(const RawBuffer&) = delete;
  RawBuffer& operator=(const RawBuffer&) = delete;
  RawBuffer(RawBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        size_(std::exchange(other.size_, 0)),
        capacity_(std::exchange(other.capacity_, 0)) {}

 protected:
  // All in bytes. Throws std::bad_alloc.
  void grow(size_t more);
  void shrink();

  char* data_ = nullptr;
  size_t size_ = 0, capacity_ = 0;
};

template <class T>
class Buffer : public RawBuffer {
 public:
  T* data() { return reinterpret_cast<T*>(data_); }
  const T* data() const { return reinterpret_cast<const T*>(data_); }
  size_t size() const { return size_ / sizeof(T); }
  // Where the next elements go, with room for `count` of them.
  T* room(size_t count) {
    if (capacity_ - size_ < count * sizeof(T)) grow(count * sizeof(T));
    return reinterpret_cast<T*>(data_ + size_);
  }
  void set_end(const T* end) {
    size_ = static_cast<size_t>(reinterpret_cast<const char*>(end) - data_);
  }
  // Gives back memory that is far more than its contents need.
  void trim() { shrink(); }
};

using IdBuffer = Buffer<uint32_t>;

}  // namespace lmfast::bpe
