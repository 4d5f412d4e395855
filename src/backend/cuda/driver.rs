//! The little of the CUDA driver API that the backend needs: one device, one stream, memory, modules, launches, graphs.
//!
//! The library is loaded at run time (cudarc's `dynamic-loading`), so a binary with this feature starts without a driver.
//! Launches carry programmatic stream serialization on sm_90 and later: a kernel may begin while its predecessor drains, and
//! waits (`pdl_wait` in every kernel) before it reads what that wrote.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys;
use cudarc::driver::sys::CUfunction_attribute_enum as F;

use crate::backend::{BackendError, Result};

include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// A device address. 0 is never a valid one; kernels that take an optional array take 0 for none.
pub type Address = sys::CUdeviceptr;

/// Turns a driver status into an error that names the operation. Every driver error is fatal: the context is unusable
/// after a failed kernel, and a failed allocation happens only at start.
pub fn check(op: &'static str, status: sys::CUresult) -> Result<()> {
    if status == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = ptr::null();
    // SAFETY: the driver writes a pointer to a static string.
    let message = unsafe {
        if sys::cuGetErrorString(status, &mut text) == sys::CUresult::CUDA_SUCCESS && !text.is_null() {
            std::ffi::CStr::from_ptr(text).to_string_lossy().into_owned()
        } else {
            format!("{status:?}")
        }
    };
    Err(BackendError {
        op,
        message,
        fatal: true,
    })
}

/// A CUDA context and its one stream.
pub struct Device {
    context: sys::CUcontext,
    stream: sys::CUstream,
    pub name: String,
    pub multiprocessors: usize,
    pub shared_per_multiprocessor: usize,
    /// Major · 10 + minor.
    pub capability: u32,
    /// Whether the kernels were compiled for sm_90 or later, and so have clusters and wait for their predecessor themselves.
    pub has_clusters: bool,
    pub free_bytes_at_start: usize,
    functions: HashMap<String, Function>,
    /// Whether anything was submitted since the last mark.
    moved: AtomicBool,
    /// Events that mark places of the stream, the last one last.
    marks: Mutex<Vec<Arc<Event>>>,
}

// SAFETY: driver handles may be used from any thread once its current context is set, which `bind` does.
unsafe impl Send for Device {}
// SAFETY: as above; the driver locks internally.
unsafe impl Sync for Device {}

/// A launch. A parameter of more than 8 bytes is as many cells of `args`, the last ones.
#[derive(Clone, Copy)]
struct Launch<'a> {
    function: Function,
    grid: [usize; 3],
    cluster: usize,
    threads: usize,
    shared_bytes: usize,
    maps: &'a [TensorMap],
    args: &'a [u64],
}

impl<'a> Launch<'a> {
    fn new(function: Function, grid: [usize; 3], threads: usize, shared_bytes: usize, args: &'a [u64]) -> Launch<'a> {
        Launch {
            function,
            grid,
            cluster: 1,
            threads,
            shared_bytes,
            maps: &[],
            args,
        }
    }
}

/// A kernel with its shared-memory limit raised.
#[derive(Clone, Copy)]
pub struct Function {
    handle: sys::CUfunction,
    name: &'static str,
    /// Dynamic shared memory that it may have without asking.
    shared_bytes: usize,
}

fn function_attribute(handle: sys::CUfunction, attribute: F) -> Result<i32> {
    let mut value = 0;
    // SAFETY: a valid function handle and out-pointer.
    check("cuFuncGetAttribute", unsafe {
        sys::cuFuncGetAttribute(&mut value, attribute, handle)
    })?;
    Ok(value)
}

/// Whether a driver is installed.
pub fn is_available() -> bool {
    // SAFETY: probes for the library, runs nothing of it.
    unsafe { sys::is_culib_present() }
}

/// Names and memory sizes in bytes of the devices that `CUDA_VISIBLE_DEVICES` leaves; none without a driver.
pub fn list_devices() -> Vec<(String, u64)> {
    let mut devices = Vec::new();
    if !is_available() {
        return devices;
    }
    // SAFETY: plain driver calls with valid out-pointers; a failure means that there is nothing to list.
    unsafe {
        let mut count = 0;
        if sys::cuInit(0) != sys::CUresult::CUDA_SUCCESS
            || sys::cuDeviceGetCount(&mut count) != sys::CUresult::CUDA_SUCCESS
        {
            return devices;
        }
        for ordinal in 0..count {
            let (mut device, mut bytes, mut name) = (0, 0, [0u8; 128]);
            if sys::cuDeviceGet(&mut device, ordinal) == sys::CUresult::CUDA_SUCCESS
                && sys::cuDeviceTotalMem_v2(&mut bytes, device) == sys::CUresult::CUDA_SUCCESS
                && sys::cuDeviceGetName(name.as_mut_ptr().cast(), 127, device) == sys::CUresult::CUDA_SUCCESS
            {
                let name = String::from_utf8_lossy(&name).trim_end_matches('\0').to_string();
                devices.push((name, bytes as u64));
            }
        }
    }
    devices
}

impl Device {
    pub fn open(ordinal: usize) -> Result<Arc<Device>> {
        if !is_available() {
            return Err(BackendError {
                op: "cuda",
                message: "no CUDA driver (libcuda.so.1) was found".into(),
                fatal: true,
            });
        }
        // SAFETY: plain driver calls with valid out-pointers.
        unsafe {
            check("cuInit", sys::cuInit(0))?;
            let mut count = 0;
            check("cuDeviceGetCount", sys::cuDeviceGetCount(&mut count))?;
            if ordinal >= count as usize {
                return Err(BackendError {
                    op: "cuda",
                    message: format!("device {ordinal} of {count}"),
                    fatal: true,
                });
            }
            let mut device = 0;
            check("cuDeviceGet", sys::cuDeviceGet(&mut device, ordinal as i32))?;
            let mut context = ptr::null_mut();
            check(
                "cuDevicePrimaryCtxRetain",
                sys::cuDevicePrimaryCtxRetain(&mut context, device),
            )?;
            check("cuCtxSetCurrent", sys::cuCtxSetCurrent(context))?;
            let attribute = |a| {
                let mut value = 0;
                check("cuDeviceGetAttribute", sys::cuDeviceGetAttribute(&mut value, a, device)).map(|()| value as u32)
            };
            use sys::CUdevice_attribute_enum as A;
            let capability = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? * 10
                + attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
            if capability < 80 {
                let message = format!(
                    "compute capability {}.{} is below 8.0",
                    capability / 10,
                    capability % 10
                );
                return Err(BackendError {
                    op: "cuda",
                    message,
                    fatal: true,
                });
            }
            let multiprocessors = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
            let shared = attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)? as usize;
            let mut name = [0u8; 128];
            check(
                "cuDeviceGetName",
                sys::cuDeviceGetName(name.as_mut_ptr().cast(), 127, device),
            )?;
            let name = String::from_utf8_lossy(&name).trim_end_matches('\0').to_string();
            let (mut free, mut total) = (0, 0);
            check("cuMemGetInfo", sys::cuMemGetInfo_v2(&mut free, &mut total))?;
            let mut stream = ptr::null_mut();
            let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            check("cuStreamCreate", sys::cuStreamCreate(&mut stream, flags))?;
            let mut device = Device {
                context,
                stream,
                name,
                multiprocessors,
                shared_per_multiprocessor: shared,
                capability,
                has_clusters: true,
                free_bytes_at_start: free,
                functions: HashMap::new(),
                moved: AtomicBool::new(true),
                marks: Mutex::default(),
            };
            device.load_modules()?;
            Ok(Arc::new(device))
        }
    }

    fn load_modules(&mut self) -> Result<()> {
        for (name, image) in MODULES {
            // SAFETY: the image is a fatbin from our build; handles are valid out-pointers.
            unsafe {
                let mut module = ptr::null_mut();
                check(name, sys::cuModuleLoadData(&mut module, image.as_ptr().cast()))?;
                let mut count = 0;
                check(name, sys::cuModuleGetFunctionCount(&mut count, module))?;
                let mut handles = vec![ptr::null_mut(); count as usize];
                check(
                    name,
                    sys::cuModuleEnumerateFunctions(handles.as_mut_ptr(), count, module),
                )?;
                for handle in handles {
                    let compiled_for = function_attribute(handle, F::CU_FUNC_ATTRIBUTE_PTX_VERSION)?;
                    self.has_clusters &= compiled_for >= 90;
                    // The same split of L1 and shared memory for all: an SM that must change it drains first, and no kernel
                    // could begin there before its predecessor has ended.
                    let attribute = F::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
                    check(name, sys::cuFuncSetAttribute(handle, attribute, 100))?;
                    let mut text = ptr::null();
                    check(name, sys::cuFuncGetName(&mut text, handle))?;
                    let text = std::ffi::CStr::from_ptr(text).to_string_lossy().into_owned();
                    // Leaked once per kernel: errors carry a static name.
                    let function = Function {
                        handle,
                        name: String::leak(text.clone()),
                        shared_bytes: function_attribute(handle, F::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)?
                            as usize,
                    };
                    self.functions.insert(text, function);
                }
            }
        }
        Ok(())
    }

    /// The kernel of this name, allowed `shared_bytes` of dynamic shared memory.
    pub fn function(&self, name: &str, shared_bytes: usize) -> Result<Function> {
        let function = *self.functions.get(name).ok_or_else(|| BackendError {
            op: "cuda",
            message: format!("the binary holds no kernel {name}"),
            fatal: true,
        })?;
        if shared_bytes > function.shared_bytes {
            let attribute = F::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a valid function handle.
            check(function.name, unsafe {
                sys::cuFuncSetAttribute(function.handle, attribute, shared_bytes as i32)
            })?;
        }
        Ok(function)
    }

    /// So much shared memory, at least `bytes`, that no second block fits beside a block that has it.
    pub fn exclusive(&self, bytes: usize) -> usize {
        bytes.max(self.shared_per_multiprocessor / 2)
    }

    /// Whether the binary holds this kernel for the device's architecture.
    pub fn has(&self, name: &str) -> bool {
        self.functions.contains_key(name)
    }

    /// Makes the context current on the calling thread.
    pub fn bind(&self) -> Result<()> {
        // SAFETY: the context lives as long as the process.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    pub fn synchronize(&self, op: &'static str) -> Result<()> {
        // SAFETY: a valid stream.
        check(op, unsafe { sys::cuStreamSynchronize(self.stream) })
    }

    /// Launches `function` with 8-byte argument cells (see [`Arg`]).
    pub fn launch(
        &self,
        function: Function,
        grid: [usize; 3],
        threads: usize,
        shared_bytes: usize,
        args: &[u64],
    ) -> Result<()> {
        self.submit(&Launch::new(function, grid, threads, shared_bytes, args))
    }

    /// The same for a kernel whose first parameters are tensor maps.
    pub fn launch_mapped(
        &self,
        function: Function,
        grid: [usize; 3],
        threads: usize,
        shared_bytes: usize,
        maps: &[TensorMap],
        args: &[u64],
    ) -> Result<()> {
        let launch = Launch::new(function, grid, threads, shared_bytes, args);
        self.submit(&Launch { maps, ..launch })
    }

    /// The same in clusters of `cluster` blocks that lie side by side in x (1 unless `has_clusters`).
    pub fn launch_clusters(
        &self,
        function: Function,
        grid: [usize; 3],
        cluster: usize,
        threads: usize,
        shared_bytes: usize,
        args: &[u64],
    ) -> Result<()> {
        let launch = Launch::new(function, grid, threads, shared_bytes, args);
        self.submit(&Launch { cluster, ..launch })
    }

    fn submit(&self, launch: &Launch<'_>) -> Result<()> {
        let Launch { function, grid, .. } = *launch;
        if grid.contains(&0) {
            return Ok(());
        }
        let mut pointers: [*mut c_void; 32] = [ptr::null_mut(); 32];
        let maps = launch.maps.iter().map(|map| ptr::from_ref(map).cast_mut().cast());
        let args = launch.args.iter().map(|arg| ptr::from_ref(arg).cast_mut().cast());
        for (pointer, parameter) in pointers.iter_mut().zip(maps.chain(args)) {
            *pointer = parameter;
        }
        // SAFETY: plain data; zero is a valid bit pattern of every field.
        let mut attributes: [sys::CUlaunchAttribute; 2] = unsafe { std::mem::zeroed() };
        let mut used = 0;
        if self.has_clusters {
            attributes[used].id = sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[used].value.programmaticStreamSerializationAllowed = 1;
            used += 1;
        }
        if launch.cluster > 1 {
            attributes[used].id = sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            attributes[used].value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 {
                x: launch.cluster as u32,
                y: 1,
                z: 1,
            };
            used += 1;
        }
        let config = sys::CUlaunchConfig {
            gridDimX: grid[0] as u32,
            gridDimY: grid[1] as u32,
            gridDimZ: grid[2] as u32,
            blockDimX: launch.threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes as u32,
            hStream: self.stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: used as u32,
        };
        self.moved.store(true, Ordering::Relaxed);
        // SAFETY: the launcher passes the arguments that the kernel's header lists; cells outlive the call, which copies them.
        check(function.name, unsafe {
            sys::cuLaunchKernelEx(&config, function.handle, pointers.as_mut_ptr(), ptr::null_mut())
        })
    }

    /// Where the stream has got to: an event that nobody records again while it is held. An event between two launches costs
    /// the device a microsecond, so this is the last one again if nothing was launched since.
    pub fn mark(&self) -> Result<Arc<Event>> {
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        if self.moved.swap(false, Ordering::Relaxed) {
            let free = marks.iter().position(|mark| Arc::strong_count(mark) == 1);
            let mark = match free {
                Some(free) => marks.remove(free),
                None => Arc::new(Event::new(self)?),
            };
            mark.record(self)?;
            marks.push(mark);
        }
        let last = marks.last().expect("the stream has moved before its first mark");
        Ok(last.clone())
    }

    /// Runs `body` under stream capture and returns the executable graph of what it launched.
    pub fn capture(&self, body: impl FnOnce() -> Result<()>) -> Result<Graph> {
        // SAFETY: valid stream and out-pointers; capture ends whether or not the body failed.
        unsafe {
            let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            check("cuStreamBeginCapture", sys::cuStreamBeginCapture_v2(self.stream, mode))?;
            let outcome = body();
            let mut graph = ptr::null_mut();
            let ended = check("cuStreamEndCapture", sys::cuStreamEndCapture(self.stream, &mut graph));
            outcome?;
            ended?;
            let mut nodes = 0;
            check(
                "cuGraphGetNodes",
                sys::cuGraphGetNodes(graph, ptr::null_mut(), &mut nodes),
            )?;
            let mut executable = ptr::null_mut();
            let instantiated = check(
                "cuGraphInstantiate",
                sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0),
            );
            check("cuGraphDestroy", sys::cuGraphDestroy(graph))?;
            instantiated?;
            Ok(Graph { executable, nodes })
        }
    }

    pub fn replay(&self, graph: &Graph) -> Result<()> {
        self.moved.store(true, Ordering::Relaxed);
        // SAFETY: a valid executable graph and stream.
        check("cuGraphLaunch", unsafe {
            sys::cuGraphLaunch(graph.executable, self.stream)
        })
    }
}

/// A captured sequence of launches. Lives as long as the process.
pub struct Graph {
    executable: sys::CUgraphExec,
    /// Launches.
    pub nodes: usize,
}
// SAFETY: a driver handle, used under the device's stream.
unsafe impl Send for Graph {}

/// What the copy engine needs to know of a matrix in global memory to bring boxes of it to shared memory (a `CUtensorMap`).
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct TensorMap([u64; 16]);

impl TensorMap {
    /// `N` dimensions of 2-byte elements, the contiguous one first: sizes, bytes between neighbours of each dimension but the
    /// first, and the box that one copy brings, 64 elements (128 bytes, swizzled) by up to 256 rows. What lies past a size
    /// arrives as zeros.
    pub fn new<const N: usize>(
        address: Address,
        sizes: [usize; N],
        strides: [usize; N],
        boxes: [u32; N],
    ) -> Result<TensorMap> {
        let mut map = TensorMap([0; 16]);
        let sizes = sizes.map(|n| n as u64);
        let strides = strides.map(|n| n as u64);
        // SAFETY: the map is 128 bytes, 64-byte aligned; the arrays have as many elements as the rank says (one stride fewer).
        check("cuTensorMapEncodeTiled", unsafe {
            sys::cuTensorMapEncodeTiled(
                ptr::from_mut(&mut map).cast(),
                sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_UINT16,
                N as u32,
                address as *mut c_void,
                sizes.as_ptr(),
                strides[1..].as_ptr(),
                boxes.as_ptr(),
                [1; N].as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        })?;
        Ok(map)
    }

    /// A row-major matrix, brought in boxes of `box_rows` rows.
    pub fn matrix(address: Address, rows: usize, cols: usize, box_rows: usize) -> Result<TensorMap> {
        TensorMap::new(address, [cols, rows], [2, cols * 2], [64, box_rows as u32])
    }
}

/// A kernel argument as an 8-byte cell; the driver reads as many bytes as the parameter has (little endian).
pub trait Arg {
    fn arg(self) -> u64;
}
impl Arg for Address {
    fn arg(self) -> u64 {
        self
    }
}
impl Arg for usize {
    /// For `int` parameters; sizes are far below 2³¹.
    fn arg(self) -> u64 {
        self as u64
    }
}
impl Arg for bool {
    fn arg(self) -> u64 {
        u64::from(self)
    }
}
impl Arg for f32 {
    fn arg(self) -> u64 {
        u64::from(self.to_bits())
    }
}

/// Device memory, zeroed, freed on drop.
pub struct Memory {
    device: Arc<Device>,
    pub address: Address,
    pub bytes: usize,
}

impl Memory {
    pub fn new(device: &Arc<Device>, bytes: usize, op: &'static str) -> Result<Memory> {
        device.bind()?;
        device.moved.store(true, Ordering::Relaxed);
        let mut address = 0;
        let bytes = bytes.max(16);
        // SAFETY: a valid out-pointer; the allocation is as large as the memset.
        unsafe {
            check(op, sys::cuMemAlloc_v2(&mut address, bytes)).map_err(|e| BackendError {
                message: format!("{} ({bytes} bytes)", e.message),
                ..e
            })?;
            check(op, sys::cuMemsetD8Async(address, 0, bytes, device.stream))?;
        }
        Ok(Memory {
            device: device.clone(),
            address,
            bytes,
        })
    }

    /// Copies pageable host bytes; done when it returns.
    pub fn upload(&self, offset: usize, data: &[u8], op: &'static str) -> Result<()> {
        assert!(offset + data.len() <= self.bytes, "{op}: upload past the end");
        self.device.moved.store(true, Ordering::Relaxed);
        // SAFETY: bounds checked; the copy from pageable memory is staged before the call returns.
        unsafe {
            check(
                op,
                sys::cuMemcpyHtoDAsync_v2(
                    self.address + offset as u64,
                    data.as_ptr().cast(),
                    data.len(),
                    self.device.stream,
                ),
            )
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // Nothing sensible can follow a failed free.
        // SAFETY: allocated by cuMemAlloc and freed once.
        unsafe {
            let _ = sys::cuCtxSetCurrent(self.device.context);
            let _ = sys::cuMemFree_v2(self.address);
        }
    }
}

/// Copies device bytes to the host and waits for them.
pub fn download(device: &Device, from: Address, out: &mut [u8], op: &'static str) -> Result<()> {
    // SAFETY: the caller's range lies in one allocation; the stream is synchronised before `out` is used.
    check(op, unsafe {
        sys::cuMemcpyDtoHAsync_v2(out.as_mut_ptr().cast(), from, out.len(), device.stream)
    })?;
    device.synchronize(op)
}

/// Page-locked host memory, the source or target of asynchronous copies.
pub struct Pinned {
    device: Arc<Device>,
    pointer: *mut u8,
    bytes: usize,
}
// SAFETY: plain memory owned by this value.
unsafe impl Send for Pinned {}

impl Pinned {
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<Pinned> {
        device.bind()?;
        let mut pointer = ptr::null_mut();
        // SAFETY: a valid out-pointer.
        check("cuMemHostAlloc", unsafe {
            sys::cuMemHostAlloc(&mut pointer, bytes.max(16), 0)
        })?;
        Ok(Pinned {
            device: device.clone(),
            pointer: pointer.cast(),
            bytes: bytes.max(16),
        })
    }

    /// Where kernels find this memory: pinned memory has one address for host and device.
    pub fn address(&self) -> Address {
        self.pointer as Address
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: owned memory of this size; every bit pattern is a valid u8.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.bytes) }
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.pointer, self.bytes) }
    }

    /// Starts a copy of the first `len` bytes to the device; this memory must stay unchanged until it is done.
    pub fn send(&self, len: usize, to: Address, op: &'static str) -> Result<()> {
        assert!(len <= self.bytes, "{op}: send past the end");
        self.device.moved.store(true, Ordering::Relaxed);
        // SAFETY: bounds checked here, the target's by the caller that sized it.
        check(op, unsafe {
            sys::cuMemcpyHtoDAsync_v2(to, self.pointer.cast(), len, self.device.stream)
        })
    }
}

/// A point in the stream that the host can wait for.
pub struct Event {
    handle: sys::CUevent,
}
// SAFETY: a driver handle.
unsafe impl Send for Event {}
// SAFETY: as above; the driver locks internally.
unsafe impl Sync for Event {}

impl Event {
    pub fn new(device: &Device) -> Result<Event> {
        Event::create(device, sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING)
    }

    /// One that [`seconds_since`](Event::seconds_since) takes.
    pub fn timed(device: &Device) -> Result<Event> {
        Event::create(device, sys::CUevent_flags_enum::CU_EVENT_DEFAULT)
    }

    fn create(device: &Device, flags: sys::CUevent_flags_enum) -> Result<Event> {
        device.bind()?;
        let mut handle = ptr::null_mut();
        // SAFETY: a valid out-pointer.
        check("cuEventCreate", unsafe {
            sys::cuEventCreate(&mut handle, flags as u32)
        })?;
        Ok(Event { handle })
    }

    /// Device time between two recorded events; waits for this one.
    pub fn seconds_since(&self, start: &Event) -> Result<f64> {
        self.wait("cuEventSynchronize")?;
        let mut milliseconds = 0.0f32;
        // SAFETY: valid handles and out-pointer.
        check("cuEventElapsedTime", unsafe {
            sys::cuEventElapsedTime(&mut milliseconds, start.handle, self.handle)
        })?;
        Ok(f64::from(milliseconds) / 1e3)
    }

    pub fn record(&self, device: &Device) -> Result<()> {
        // SAFETY: valid handles.
        check("cuEventRecord", unsafe {
            sys::cuEventRecord(self.handle, device.stream)
        })
    }

    pub fn wait(&self, op: &'static str) -> Result<()> {
        // SAFETY: a valid handle.
        check(op, unsafe { sys::cuEventSynchronize(self.handle) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created by cuEventCreate and destroyed once.
        unsafe {
            let _ = sys::cuEventDestroy_v2(self.handle);
        }
    }
}

/// The driver's version as `major.minor`, for the start log.
pub fn driver_version() -> Result<String> {
    let mut version = 0;
    // SAFETY: a valid out-pointer.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut version) })?;
    Ok(format!("{}.{}", version / 1000, version % 1000 / 10))
}
