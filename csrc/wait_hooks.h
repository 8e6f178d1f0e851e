// What a blocking wait does around its slices. The core knows no Python; the bindings give the GIL
// away here.
#pragma once

namespace mld {

class WaitHooks {
 public:
  virtual ~WaitHooks() = default;
  // Called before and after each slice of at most 50 ms.
  virtual void before_slice() {}
  virtual void after_slice() {}  // may throw; the wait ends then
};

}  // namespace mld
