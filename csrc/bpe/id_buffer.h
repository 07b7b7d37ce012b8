// A growing array of ids whose memory is reused between calls.
//
// A fresh 14 MB buffer for every call costs more in page faults than the encoding itself: 423 MB/s
// instead of 540.
#pragma once
#include <cstddef>
#include <cstdint>

namespace lmfast::bpe {

class IdBuffer {
 public:
  IdBuffer() = default;
  ~IdBuffer();
  IdBuffer(const IdBuffer&) = delete;
  IdBuffer& operator=(const IdBuffer&) = delete;
  IdBuffer(IdBuffer&& other) noexcept;

  uint32_t* data() { return data_; }
  size_t size() const { return size_; }
  // Where the next ids go, with room for `count` of them. Throws std::bad_alloc.
  uint32_t* room(size_t count) {
    if (capacity_ - size_ < count) grow(count);
    return data_ + size_;
  }
  void set_end(const uint32_t* end) { size_ = static_cast<size_t>(end - data_); }
  void clear() { size_ = 0; }
  // Gives back memory that is far larger than its contents need.
  void trim();

 private:
  void grow(size_t count);

  uint32_t* data_ = nullptr;
  size_t size_ = 0, capacity_ = 0;
};

}  // namespace lmfast::bpe
