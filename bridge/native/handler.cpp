// One XLA custom call for all packages of AOTInductor: XLA's buffers go in, the package runs, its
// results are written to XLA's buffers. No Python, no GIL.
//
// Python names a package by a key, which compiled programs hold as an attribute. Everything that
// Python calls here is a C function (see handler.py); it returns nullptr, or the text of an error
// that lives until the thread's next call.

#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <sstream>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/TensorImpl.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Loader = torch::inductor::AOTIModelPackageLoader;

// ---------------------------------------------------------------- types of arrays

struct Type {
  at::ScalarType dtype;
  std::vector<int64_t> shape;

  bool operator==(const Type& other) const { return dtype == other.dtype && shape == other.shape; }
};

at::ScalarType scalar_type(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::PRED: return at::kBool;
    case ffi::DataType::S8: return at::kChar;
    case ffi::DataType::S16: return at::kShort;
    case ffi::DataType::S32: return at::kInt;
    case ffi::DataType::S64: return at::kLong;
    case ffi::DataType::U8: return at::kByte;
    case ffi::DataType::U16: return at::kUInt16;
    case ffi::DataType::U32: return at::kUInt32;
    case ffi::DataType::U64: return at::kUInt64;
    case ffi::DataType::F16: return at::kHalf;
    case ffi::DataType::BF16: return at::kBFloat16;
    case ffi::DataType::F32: return at::kFloat;
    case ffi::DataType::F64: return at::kDouble;
    case ffi::DataType::C64: return at::kComplexFloat;
    case ffi::DataType::C128: return at::kComplexDouble;
    default: return at::ScalarType::Undefined;
  }
}

// The names that the bridge writes: float32, int64, bool. Those of torch's C++ differ.
at::ScalarType scalar_type(const std::string& name) {
  static const std::unordered_map<std::string, at::ScalarType> types = {
      {"bool", at::kBool},         {"int8", at::kChar},
      {"int16", at::kShort},       {"int32", at::kInt},
      {"int64", at::kLong},        {"uint8", at::kByte},
      {"uint16", at::kUInt16},     {"uint32", at::kUInt32},
      {"uint64", at::kUInt64},     {"float16", at::kHalf},
      {"bfloat16", at::kBFloat16}, {"float32", at::kFloat},
      {"float64", at::kDouble},    {"complex64", at::kComplexFloat},
      {"complex128", at::kComplexDouble}};
  auto found = types.find(name);
  return found == types.end() ? at::ScalarType::Undefined : found->second;
}

// "float32 64 3;int32 2 1840" -> types
std::vector<Type> types_of(const char* text) {
  std::vector<Type> types;
  std::istringstream arrays(text);
  std::string array;
  while (std::getline(arrays, array, ';')) {
    std::istringstream words(array);
    std::string dtype;
    words >> dtype;
    Type type{scalar_type(dtype), {}};
    int64_t size = 0;
    while (words >> size) type.shape.push_back(size);
    types.push_back(std::move(type));
  }
  return types;
}

std::string described(const Type& type) {
  std::ostringstream text;
  text << at::toString(type.dtype) << "(";
  for (size_t i = 0; i < type.shape.size(); ++i) text << (i ? ", " : "") << type.shape[i];
  text << ")";
  return text.str();
}

std::string message(const std::string& expected, const std::string& got, const std::string& advice) {
  return "expected " + expected + ", got " + got + "; " + advice;
}

// ---------------------------------------------------------------- packages

// A tensor of the user's that a package has a copy of. It is held weakly: who replaces a weight
// lets the old one die.
struct Watched {
  c10::weak_intrusive_ptr<at::TensorImpl> tensor;
  uint32_t version;
  const void* memory;

  explicit Watched(at::TensorImpl* impl)
      : tensor(c10::intrusive_ptr<at::TensorImpl>::unsafe_reclaim_from_nonowning(impl)),
        version(impl->version_counter().current_version()),
        memory(impl->unsafe_storage() ? impl->storage().data() : nullptr) {}

  bool changed() const {
    auto now = tensor.lock();
    if (!now) return true;
    if (now->version_counter().current_version() != version) return true;
    return now->unsafe_storage() && now->storage().data() != memory;
  }
};

struct Package {
  std::shared_ptr<Loader> loader;
  std::vector<Type> inputs;
  std::vector<Type> outputs;
  bool has_status;
  std::vector<Watched> watched;
};

// These are never destroyed: a program may still run as the process ends.
std::shared_mutex& mutex = *new std::shared_mutex;  // of what follows
auto& packages = *new std::unordered_map<std::string, std::shared_ptr<Package>>;
auto& loaders = *new std::unordered_map<std::string, std::weak_ptr<Loader>>;  // by path
std::atomic<bool> ended{false};
std::atomic<int64_t> refused{0};  // calls since then

std::shared_ptr<Package> find(const std::string& key) {
  std::shared_lock lock(mutex);
  auto found = packages.find(key);
  return found == packages.end() ? nullptr : found->second;
}

// What Python does about an error: it evaluates the same inputs eagerly, which raises the user's
// own exception. It writes the text of that, and returns its length, or 0 if it found nothing.
using Explain = int64_t (*)(const char* key, const char* what, void** inputs, char* text,
                            int64_t size);
std::atomic<Explain> explain{nullptr};

std::string explained(const std::string& key, const std::string& what,
                      const std::vector<void*>& inputs) {
  Explain ask = explain.load();
  if (ask == nullptr) return what;
  std::string text(1 << 16, '\0');
  std::vector<void*> pointers(inputs);
  int64_t length = ask(key.c_str(), what.c_str(), pointers.data(), text.data(),
                       static_cast<int64_t>(text.size()));
  return length > 0 ? text.substr(0, length) : what;
}

// ---------------------------------------------------------------- the status of a call

// Row: code, then numbers for the places of the text, which the package carries in its metadata.
std::string status_text(Package& package, const double* status, int64_t size) {
  auto metadata = package.loader->get_metadata();
  auto code = static_cast<int64_t>(status[0]);
  auto found = metadata.find("bridge.status." + std::to_string(code));
  if (found == metadata.end()) return "the call failed with status " + std::to_string(code);
  std::ostringstream text;
  int64_t place = 1;
  const std::string& form = found->second;
  for (size_t i = 0; i < form.size(); ++i) {
    if (form[i] == '{' && i + 1 < form.size() && form[i + 1] == '}' && place < size) {
      text << status[place++];
      ++i;
    } else {
      text << form[i];
    }
  }
  return text.str();
}

// ---------------------------------------------------------------- one call

struct Arrays {
  std::vector<Type> types;
  std::vector<void*> data;
};

std::string mismatch(const char* what, const std::vector<Type>& expected,
                     const std::vector<Type>& got) {
  if (expected == got) return "";
  if (expected.size() != got.size()) {
    return message(std::to_string(expected.size()) + " " + what + "s", std::to_string(got.size()),
                   "call it as it was compiled");
  }
  size_t i = 0;
  while (expected[i] == got[i]) ++i;
  return message(what + (" " + std::to_string(i)) + " as " + described(expected[i]),
                 described(got[i]), "call it as it was compiled");
}

void write(const at::Tensor& result, const Type& type, void* memory, const at::Device& device) {
  auto options = at::TensorOptions().dtype(type.dtype).device(device);
  bool plain = device.is_cpu() && result.is_contiguous() && result.scalar_type() == type.dtype;
  if (plain) {
    std::memcpy(memory, result.const_data_ptr(), result.nbytes());
  } else {
    at::from_blob(memory, type.shape, options).copy_(result, /*non_blocking=*/true);
  }
}

const char* const STALE =
    "expected the weights that the program was compiled with, got some that have changed since; "
    "call bridge.to_jax or bridge.potential again and jit that, or take bridge.functional, where weights are inputs";

const char* const ENDED =
    "expected a call before the process ends, got one at its end; "
    "wait for its results by jax.block_until_ready, and don't call it in atexit handlers";

ffi::Error run(std::string_view name, const Arrays& given, const Arrays& results,
               const at::Device& device) {
  if (ended.load()) {
    ++refused;
    return ffi::Error(ffi::ErrorCode::kAborted, ENDED);
  }
  std::string key(name);
  std::string what;
  try {
    auto package = find(key);
    if (package == nullptr) {
      return ffi::Error(ffi::ErrorCode::kNotFound,
                        message("a package that this process has loaded", key,
                                "load it with bridge.native.load, or compile the program here"));
    }
    for (const Watched& tensor : package->watched) {
      if (tensor.changed()) return ffi::Error(ffi::ErrorCode::kFailedPrecondition, STALE);
    }
    std::string wrong = mismatch("input", package->inputs, given.types);
    if (wrong.empty()) wrong = mismatch("output", package->outputs, results.types);
    if (!wrong.empty()) return ffi::Error(ffi::ErrorCode::kInvalidArgument, wrong);

    c10::InferenceMode guard;
    std::vector<at::Tensor> inputs;
    inputs.reserve(given.data.size());
    for (size_t i = 0; i < given.data.size(); ++i) {
      auto options = at::TensorOptions().dtype(given.types[i].dtype).device(device);
      inputs.push_back(at::from_blob(given.data[i], given.types[i].shape, options));
    }
    std::vector<at::Tensor> found = package->loader->boxed_run(std::move(inputs));

    size_t n = results.data.size();
    if (found.size() != n + (package->has_status ? 1 : 0)) {
      what = message(std::to_string(n) + " results", std::to_string(found.size()),
                     "compile the package again");
    } else if (package->has_status && device.is_cpu()) {
      const at::Tensor& status = found[n];
      const double* row = status.const_data_ptr<double>();
      if (row[0] != 0) what = status_text(*package, row, status.numel());
    }
    if (what.empty()) {
      for (size_t i = 0; i < n; ++i) write(found[i], results.types[i], results.data[i], device);
      return ffi::Error::Success();
    }
  } catch (const c10::OutOfMemoryError& e) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, e.what_without_backtrace());
  } catch (const c10::Error& e) {
    what = e.what_without_backtrace();
  } catch (const std::exception& e) {
    what = e.what();
  } catch (...) {
    what = "an unknown C++ exception";
  }
  std::string text = device.is_cpu() ? explained(key, what, given.data) : what;
  return ffi::Error(ffi::ErrorCode::kInternal, text);
}

// ---------------------------------------------------------------- what XLA calls

template <typename Buffer>
void add(Arrays& arrays, const Buffer& buffer) {
  auto shape = buffer.dimensions();
  arrays.types.push_back({scalar_type(buffer.element_type()), {shape.begin(), shape.end()}});
  arrays.data.push_back(buffer.untyped_data());
}

ffi::Error taken(ffi::RemainingArgs args, ffi::RemainingRets rets, Arrays& given,
                 Arrays& results) {
  for (size_t i = 0; i < args.size(); ++i) {
    auto buffer = args.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return buffer.error();
    add(given, buffer.value());
  }
  for (size_t i = 0; i < rets.size(); ++i) {
    auto buffer = rets.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return buffer.error();
    add(results, *buffer.value());
  }
  return ffi::Error::Success();
}

ffi::Error on_cpu(std::string_view key, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Arrays given, results;
  ffi::Error error = taken(args, rets, given, results);
  return error.failure() ? error : run(key, given, results, at::Device(at::kCPU));
}

// XLA's stream becomes torch's current one, on XLA's device. Nothing waits for the host. It is not
// registered as compatible with command buffers: a package allocates its results anew.
ffi::Error on_gpu(std::string_view key, void* stream, int32_t ordinal, ffi::RemainingArgs args,
                  ffi::RemainingRets rets) {
  Arrays given, results;
  ffi::Error error = taken(args, rets, given, results);
  if (error.failure()) return error;
  try {
    at::Device device(at::kCUDA, static_cast<at::DeviceIndex>(ordinal));
    c10::DeviceGuard on_device(device);
    c10::impl::VirtualGuardImpl cuda(at::kCUDA);
    // torch keeps a foreign stream as its address
    c10::Stream foreign(c10::Stream::UNSAFE, device, reinterpret_cast<c10::StreamId>(stream));
    c10::Stream before = cuda.exchangeStream(foreign);
    error = run(key, given, results, device);
    cuda.exchangeStream(before);
  } catch (const std::exception& e) {
    return ffi::Error(ffi::ErrorCode::kInternal, e.what());
  }
  return error;
}

thread_local std::string last_error;

template <typename F>
const char* guarded(F body) {
  try {
    body();
    return nullptr;
  } catch (const c10::Error& e) {
    last_error = e.what_without_backtrace();
  } catch (const std::exception& e) {
    last_error = e.what();
  }
  return last_error.c_str();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(bridge_native_cpu, on_cpu,
                              ffi::Ffi::Bind()
                                  .Attr<std::string_view>("package")
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(bridge_native_gpu, on_gpu,
                              ffi::Ffi::Bind()
                                  .Attr<std::string_view>("package")
                                  .Ctx<ffi::PlatformStream<void*>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .RemainingArgs()
                                  .RemainingRets());

// ---------------------------------------------------------------- what Python calls

extern "C" {

// Loads the package at `path` under `key`. `runners` calls of it can run at once. Packages of one
// path share its code and its weights.
const char* bridge_native_load(const char* key, const char* path, const char* inputs,
                               const char* outputs, int32_t has_status, int64_t runners) {
  return guarded([&] {
    auto package = std::make_shared<Package>();
    {
      std::shared_lock lock(mutex);
      auto known = loaders.find(path);
      if (known != loaders.end()) package->loader = known->second.lock();
    }
    if (package->loader == nullptr) {
      package->loader = std::make_shared<Loader>(path, "model", false, runners);
    }
    package->inputs = types_of(inputs);
    package->outputs = types_of(outputs);
    package->has_status = has_status != 0;
    std::unique_lock lock(mutex);
    loaders[path] = package->loader;
    packages[key] = std::move(package);
  });
}

// Notes a tensor of the user's, by the address of its TensorImpl, whose change makes calls fail.
const char* bridge_native_watch(const char* key, void* tensor) {
  return guarded([&] {
    std::unique_lock lock(mutex);
    packages.at(key)->watched.emplace_back(static_cast<at::TensorImpl*>(tensor));
  });
}

// Forgets a package. A call that runs keeps it until it ends.
void bridge_native_drop(const char* key) {
  std::unique_lock lock(mutex);
  packages.erase(key);
}

void bridge_native_explain(Explain ask) { explain.store(ask); }

// The process ends: calls fail from now on, and ask Python nothing. Returns how many have failed so.
int64_t bridge_native_end() {
  ended.store(true);
  explain.store(nullptr);
  return refused.load();
}

}  // extern "C"
