// From a torch tensor to bytes: which objects are taken, how they are made plain and dense, and how
// their memory is borrowed. By DLPack's C exchange API where torch has it (2.10+), else by
// data_ptr(), which knows every dtype of every torch, where __dlpack__ refuses the float8 types
// before 2.9.
//
// All with the GIL held.
#pragma once

#include <pybind11/pybind11.h>

#include "capture/recorder.h"
#include "capture/tensor_view.h"

namespace mld {

// Whether `object` is exactly a torch.Tensor or torch.nn.Parameter: a subclass may mean its bytes
// differently.
[[nodiscard]] bool is_exact_tensor(PyObject* object) noexcept;

class TensorSource final : public ByteSource {
 public:
  // Takes what it can of `tensor` as it stands, and a dense copy of what it cannot: a CUDA tensor
  // stays on its device, all else becomes a CPU tensor. Throws Error(kInvalidType) for what has no
  // dense bytes.
  explicit TensorSource(pybind11::handle tensor);

  [[nodiscard]] const TensorView& view() const noexcept { return view_; }
  // Address of the bytes: on the device if is_on_device().
  [[nodiscard]] const std::byte* borrow() override;
  [[nodiscard]] bool is_on_device() const noexcept { return place_.device >= 0; }
  // The CUDA device's index; -1 on the host.
  [[nodiscard]] int device() const noexcept { return place_.device; }
  // REQUIRES: is_on_device(). The device, and the stream that torch computes on there now.
  [[nodiscard]] DevicePlace place() const;
  // Becomes a CPU copy; waits for the device.
  void move_to_host();

 private:
  [[nodiscard]] bool try_borrow();
  void make_plain();
  [[nodiscard]] bool is_strided() const;
  void view_by_pointer();

  pybind11::object tensor_;  // the user's, or our dense copy
  DevicePlace place_{-1, nullptr};
  TensorView view_;
  std::vector<std::int64_t> dims_;  // only without the exchange API
};

// Size of the first dimension; -1 for a scalar and for what cannot be stored as it stands.
[[nodiscard]] std::int64_t first_dimension(PyObject* tensor) noexcept;

// Whether `tensor` is exactly a torch.Tensor whose dense bytes can be stored as they stand. False
// says only that a closer look is needed.
[[nodiscard]] bool is_dense(PyObject* tensor);

// Whether the calling thread runs inside autograd's backward, where activation checkpointing
// computes layers anew.
[[nodiscard]] bool is_in_backward();

// Imports torch and looks up what we need of it. When a recorder is made: not at import, since
// readers and the uploader do without torch, and not in the first hook, since two hooks that met in
// it could deadlock: one in the import without the GIL, one with the GIL waiting for the first.
void look_up_torch();

// Tests only: behave as with a torch that lacks the exchange API.
void use_exchange_api(bool use) noexcept;

}  // namespace mld
